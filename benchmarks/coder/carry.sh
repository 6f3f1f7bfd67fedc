#!/usr/bin/env bash
# Bring large files to a machine without network, in pieces that each fit a limited transfer.
#   carry.sh split FILE FOLDER [BYTES]     here: FILE as FOLDER/00, 01, ... of BYTES each (default 57,000,000)
#   carry.sh join FOLDER FILE SHA256       there: the pieces in FOLDER as FILE, which must have this sha256; pieces go
# Small files travel as they are: all of data/ but the model and raw/ is about 4 MB.
set -euo pipefail

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }

case "${1:-}" in
split)
  [ $# -ge 3 ] || usage
  mkdir -p "$3"
  if [ -n "$(ls -A "$3")" ]; then echo "$3: not empty; pieces of another file would be joined with these" >&2; exit 1; fi
  split -d -a 2 -b "${4:-57000000}" "$2" "$3/"
  sha256sum "$2"
  ls -l "$3"
  ;;
join)
  [ $# -eq 4 ] || usage
  mkdir -p "$(dirname "$3")"
  cat "$2"/[0-9][0-9] > "$3.partial"
  found=$(sha256sum "$3.partial" | cut -d' ' -f1)
  if [ "$found" != "$4" ]; then
    echo "$3: sha256 $found, expected $4: a piece is missing or broken; found $(ls "$2" | tr '\n' ' ')" >&2
    rm "$3.partial"
    exit 1
  fi
  touch -d @0 "$3.partial"  # large inputs of a run are known by size and time: the same here as on the next machine
  mv "$3.partial" "$3"
  rm "$2"/[0-9][0-9]
  ;;
*) usage ;;
esac
