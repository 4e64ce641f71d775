# Sourced by the other scripts: --help prints the comment at their top and ends them, before anything is begun.
unset CDPATH  # with it, cd prints where it goes, and may go elsewhere
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit
fi
