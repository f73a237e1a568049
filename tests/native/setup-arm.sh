#!/bin/sh
# Installs what the test of the ARM kernels needs (a cross compiler and an emulator) on Debian and Ubuntu, as root.
set -eu
packages="g++-aarch64-linux-gnu qemu-user"
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "setup-arm.sh: needs Debian's or Ubuntu's apt-get, and root; install by hand what stands for: $packages" >&2
  exit 1
fi
apt-get update -q
# shellcheck disable=SC2086  # two packages
apt-get install -q -y --no-install-recommends $packages
