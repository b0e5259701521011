# Sourced by scripts that run in stages, each of which says what it does and how many seconds it took.

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

# missing COMMAND ...: whether one of them is not installed.
missing() {
  for each; do
    command -v "$each" >/dev/null || return 0
  done
  return 1
}

# install_packages PACKAGE ...: Debian's, without those they only recommend.
install_packages() {
  quiet_stage "apt: $*" sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "$@"' sh "$@"
}
