#!/bin/sh
# Installs what the tests of the page drive and ask: a browser (Debian and Ubuntu, as root), and axe-core from npm, which
# lies under build/.
set -eu
cd "$(dirname "$0")/../../.."
if ! command -v chromium >/dev/null; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "setup.sh: needs Debian's or Ubuntu's apt-get, and root; install by hand what stands for: chromium npm" >&2
    exit 1
  fi
  apt-get update -q
  apt-get install -q -y --no-install-recommends chromium fonts-noto-cjk
  command -v npm >/dev/null || apt-get install -q -y --no-install-recommends npm
fi
npm install --loglevel=error --no-save --ignore-scripts --prefix build/axe axe-core@4.14.1
