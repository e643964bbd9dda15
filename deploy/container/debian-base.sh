#!/bin/sh
# A base image of Debian's packages only, where no registry of images can be reached:
#   sh debian-base.sh base.tar
# SOURCE_DATE_EPOCH in the environment makes the archive the same bit by bit.
set -eu
exec mmdebstrap --quiet --variant=apt --include=ca-certificates,passwd,python3,python3-venv \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$1"
