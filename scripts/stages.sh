# Sourced by scripts that run in stages: each says what it does and how many seconds it took.

# stage WHAT COMMAND ...: shows what the command prints.
stage() {
  local what=$1 began=$SECONDS
  shift
  echo "== $what"
  "$@"
  echo "   $((SECONDS - began)) s"
}

# quiet_stage WHAT COMMAND ...: shows what the command prints only where it fails.
quiet_stage() {
  local what=$1 began=$SECONDS said
  shift
  echo "== $what"
  said=$(mktemp)
  if ! "$@" >"$said" 2>&1; then
    cat "$said" >&2
    rm -f "$said"
    echo "failed: $*" >&2
    exit 1
  fi
  rm -f "$said"
  echo "   $((SECONDS - began)) s"
}
