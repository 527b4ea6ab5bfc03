#!/usr/bin/env bash
# What action.yml runs: `qguard-edge check` with the action's inputs, all reports, and the verdict as output.
# Inputs come as environment variables: CANDIDATE or SERVER, BASELINE, LIMIT, MARGIN, REPORTS, FAIL_ON_INCONCLUSIVE.
set -uo pipefail

arguments=(--overwrite --baseline "$BASELINE")
[ -z "$MARGIN" ] || arguments+=(--margin "$MARGIN")
[[ -n "${SERVER:-}" ]] && arguments+=(--server "$SERVER")
[[ -n "${LIMIT:-}" ]] && arguments+=(--limit "$LIMIT")
mkdir -p -- "$REPORTS"
for report in html:report.html junit:junit.xml sarif:report.sarif markdown:report.md; do
  arguments+=("--${report%%:*}" "$REPORTS/${report#*:}")
done
[[ -n "${CANDIDATE:-}" ]] && arguments+=(-- "$CANDIDATE")

qguard-edge check --json "${arguments[@]}" > "$REPORTS/result.json"
code=$?
# The log is all that many will look at: what was found, and what to do.
said='import json, sys; d = json.load(open(sys.argv[1])); print("qguard-edge:", "; ".join(filter(None, map(d.get, ("summary", "advice", "error")))))'
[[ -s "$REPORTS/result.json" ]] && python3 -c "$said" "$REPORTS/result.json"
verdicts=([0]=pass [1]=fail [3]=inconclusive)
{
  echo "verdict=${verdicts[$code]:-error}"
  [[ -f "$REPORTS/report.sarif" ]] && echo "sarif=$REPORTS/report.sarif"
} >> "$GITHUB_OUTPUT"

if [[ $code -eq 3 && "${FAIL_ON_INCONCLUSIVE:-true}" != "true" ]]; then
  echo "::warning::qguard-edge: inconclusive, too few prompts to decide"
  exit 0
fi
exit "$code"
