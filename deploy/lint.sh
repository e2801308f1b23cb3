#!/usr/bin/env bash
# Checks the deployment files and the shell scripts with every linter that is on PATH. A missing one is named and
# skipped: some come with no package index (promtool and systemd-analyze are Debian packages).
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

# check WHAT TOOL COMMAND...: runs the command, for which TOOL must be there.
check() {
    local what=$1 tool=$2
    if ! command -v "$tool" >/dev/null 2>&1; then
        echo "  skipped  $what: $tool is not installed"
    elif "${@:3}" >"$scratch/out" 2>&1; then
        echo "  ok       $what ($tool)"
    else
        echo "  FAILED   $what:"
        sed 's/^/           /' "$scratch/out"
        failed=1
    fi
}

# systemd-analyze only warns about a key that it does not know, which is what a misspelt one is.
# shellcheck disable=SC2329  # called through check
unit_without_warnings() {
    systemd-analyze verify "$1" 2>&1 | tee "$scratch/unit"
    ! grep -q "^$1:" "$scratch/unit"
}

# The unit as installed, but for its program, which need not exist here.
sed 's|^ExecStart=[^ ]*|ExecStart=/bin/true|' deploy/systemd/lorikeet.service >"$scratch/lorikeet.service"

check "Dockerfile" hadolint hadolint --failure-threshold info deploy/Dockerfile
check "shell scripts" shellcheck shellcheck .ci/run deploy/lint.sh
check "YAML" yamllint yamllint --strict -c deploy/yamllint.yaml deploy
check "compose files" check-jsonschema \
    check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml deploy/compose.cuda.yaml
check "Prometheus configuration" promtool promtool check config deploy/prometheus.yml
check "systemd unit" systemd-analyze unit_without_warnings "$scratch/lorikeet.service"
# 0 is confined, 10 is not: 20 stands for 2.0; the unit's comments say what stays open and why.
check "systemd hardening" systemd-analyze \
    systemd-analyze security --offline=true --threshold=20 "$scratch/lorikeet.service"
exit "$failed"
