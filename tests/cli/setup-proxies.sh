#!/bin/sh
# Installs the proxies that deploy/ has files for, which test_proxies.py drives (Debian and Ubuntu, as root).
set -eu
if command -v nginx >/dev/null && command -v caddy >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "setup-proxies.sh: needs Debian's or Ubuntu's apt-get, and root; install by hand what stands for: nginx caddy" >&2
  exit 1
fi
apt-get update -q
apt-get install -q -y --no-install-recommends nginx-light caddy
