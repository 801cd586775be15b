"""Known holes of the locked packages, by pip-audit. Exit code 0: asked and none; 1: some; 3: not all could be asked."""

import json
import subprocess
import sys
from pathlib import Path

command = [str(Path(sys.executable).parent / "pip-audit"), "--requirement", "requirements.txt", "--no-deps",
           "--disable-pip", "--format", "json", "--progress-spinner", "off"]  # fmt: skip
done = subprocess.run(command, capture_output=True, text=True, check=False)
try:
    packages = json.loads(done.stdout)["dependencies"]
except ValueError:
    print(f"NOT AUDITED: pip-audit gave no answer: {done.stderr.strip()[-300:]}", file=sys.stderr)
    sys.exit(3)
unasked = [package for package in packages if "skip_reason" in package]
holes = [(package, hole) for package in packages for hole in package.get("vulns", [])]
for package, hole in holes:
    print(
        f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'none'}"
    )
asked = len(packages) - len(unasked)
if unasked or not packages:
    why = unasked[0]["skip_reason"] if unasked else "pip-audit listed no package"
    print(f"NOT AUDITED: {len(unasked)} of {len(packages)} packages could not be asked for ({why})", file=sys.stderr)
print(f"{asked} packages asked for, {len(holes)} known holes")
sys.exit(1 if holes else 3 if unasked or not packages else 0)
