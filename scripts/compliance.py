"""What is inside the package: a bill of materials, the licences' gate, and the gate for known vulnerabilities.

    python scripts/compliance.py install WHEEL             # an environment with the wheel and its locked requirements
    python scripts/compliance.py sbom WHEEL --output FILE  # CycloneDX 1.6, with the compiled parts
    python scripts/compliance.py licences                  # fails on a licence that is unknown or not on the list
    python scripts/compliance.py audit                     # fails on a known vulnerability, and if nobody can be asked

`make compliance` and `make audit` run them. The tools are those of requirements/tools.txt, in `.tools`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / ".tools" / "bin"
CLEAN = ROOT / ".tools" / "clean"
RUNTIME = ROOT / "requirements" / "runtime.txt"

# Licences that let anyone use, change and sell what contains them. Copyleft, even a weak one, is for a person to judge.
# As pip-licenses prints them. MPL 2.0 binds files of its own only, none of which is changed here.
ALLOWED = (
    "3-Clause BSD License",
    "Apache-2.0",
    "Apache-2.0 AND BSD-2-Clause",
    "Apache-2.0 OR BSD-2-Clause",
    "Apache Software License",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "ISC License (ISCL)",
    "MIT",
    "MIT License",
    "MIT OR Apache-2.0",
    "MPL-2.0 AND MIT",
    "PSF-2.0",
    "Python Software Foundation License",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install")
    install.add_argument("wheel", type=Path)
    sbom = commands.add_parser("sbom")
    sbom.add_argument("wheel", type=Path)
    sbom.add_argument("--output", type=Path, required=True)
    commands.add_parser("licences")
    commands.add_parser("audit")
    arguments = parser.parse_args()
    if arguments.command == "install":
        install_clean(arguments.wheel)
    elif arguments.command == "sbom":
        write_sbom(arguments.wheel, arguments.output)
    elif arguments.command == "licences":
        check_licences()
    else:
        return audit()
    return 0


def install_clean(wheel: Path) -> None:
    """Makes an environment with the wheel and exactly its locked requirements, and lets pip check it."""
    shutil.rmtree(CLEAN, ignore_errors=True)
    venv.create(CLEAN, with_pip=True)
    pip = [str(CLEAN / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--require-hashes", "-r", str(RUNTIME)], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    subprocess.run([*pip, "check"], check=True)
    # The environment's own tools are no part of the package.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "setuptools", "pip"], check=True)
    print(f"installed into {CLEAN}")


def write_sbom(wheel: Path, output: Path) -> None:
    """The environment's components, the wheel's compiled parts, and what is linked into them."""
    command = [str(TOOLS / "cyclonedx-py"), "environment", str(CLEAN / "bin" / "python")]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "application", "--sv", "1.6", "--of", "JSON"]
    command += ["--output-reproducible", "--validate", "-o", "-"]
    bill = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    root = bill["metadata"]["component"]
    root["version"] = wheel.name.split("-")[1]
    root["hashes"] = [{"alg": "SHA-256", "content": digest(wheel.read_bytes())}]
    parts = native_components(wheel)
    bill["components"] += parts
    for dependency in bill["dependencies"]:
        if dependency["ref"] == root["bom-ref"]:
            dependency["dependsOn"] = sorted({*dependency.get("dependsOn", ()), *(part["bom-ref"] for part in parts)})
    bill["dependencies"] += [{"ref": part["bom-ref"]} for part in parts]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    validate(output)
    print(f"{output}: CycloneDX {bill['specVersion']}, {len(bill['components'])} components, {len(parts)} native")


def native_components(wheel: Path) -> list[dict[str, Any]]:
    """The wheel's shared libraries by digest, and the libraries whose code they hold."""
    parts: list[dict[str, Any]] = []
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name: archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".so")}
    for name, content in libraries.items():
        parts.append(
            {
                "type": "library",
                "bom-ref": f"file:{name}",
                "name": name,
                "version": wheel.name.split("-")[1],
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "hashes": [{"alg": "SHA-256", "content": digest(content)}],
                "properties": [{"name": "tokenwire:part", "value": "compiled"}],
            }
        )
    parts.append(linked("pybind11", build_version("pybind11"), "BSD-3-Clause", "pkg:pypi/pybind11"))
    if any("tokenwire_cuda" in name for name in libraries):
        toolkit = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        part = linked("cudart_static", first(r"V(\d+\.\d+\.\d+)", toolkit), "", "pkg:generic/nvidia-cuda-runtime")
        part["licenses"] = [{"license": {"name": "NVIDIA CUDA Toolkit EULA (redistributable: cudart_static)"}}]
        parts.append(part)
    return parts


def linked(name: str, version: str, licence: str, purl: str) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": f"linked:{name}",
        "name": name,
        "version": version,
        "purl": f"{purl}@{version}",
        "licenses": [{"license": {"id": licence}}] if licence else [],
        "properties": [{"name": "tokenwire:part", "value": "linked in"}],
    }


def build_version(name: str) -> str:
    """The locked version of a build requirement."""
    return first(rf"^{name}==(\S+)", (ROOT / "requirements" / "build.txt").read_text(encoding="utf-8"))


def first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: nothing looks like {pattern}")
    return found[1]


def validate(bill: Path) -> None:
    """Against CycloneDX's own schema, strictly."""
    code = (
        "import sys; from cyclonedx.validation.json import JsonStrictValidator as V; "
        "from cyclonedx.schema import SchemaVersion as S; "
        "e = V(S.V1_6).validate_str(open(sys.argv[1], encoding='utf-8').read()); sys.exit(str(e) if e else 0)"
    )
    subprocess.run([str(TOOLS / "python"), "-c", code, str(bill)], check=True)


def check_licences() -> None:
    command = [str(TOOLS / "pip-licenses"), "--python", str(CLEAN / "bin" / "python"), "--from=mixed"]
    command += ["--order=license", f"--allow-only={';'.join(ALLOWED)}"]
    subprocess.run(command, check=True)


def audit() -> int:
    """Asks for known vulnerabilities of the locked requirements. What could not be asked counts as a failure.

    `--strict` makes it so: without it pip-audit says "no known vulnerabilities" of packages that it skipped.
    """
    command = [str(TOOLS / "pip-audit"), "--strict", "--disable-pip", "--require-hashes"]
    status = 0
    for lock in ("runtime", "build"):
        result = subprocess.run([*command, "-r", str(ROOT / "requirements" / f"{lock}.txt")], check=False)
        if result.returncode != 0:
            print(f"error: requirements/{lock}.txt has known vulnerabilities, or could not be audited", file=sys.stderr)
            status = 1
    return status


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
