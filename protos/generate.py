"""Generates the Python stubs and their types from protos/v1/*.proto: `python protos/generate.py [--check]`.

protoc writes below its output root by the path it was given. The virtual path `lorikeet/protos=protos` makes that path
`lorikeet/protos/v1/...`, so the stubs import each other as `lorikeet.protos.v1...` without being edited. They are made
in a temporary directory and copied here. `--check` changes nothing and exits 1 when the committed stubs differ.

Google's files that ours import come with the package googleapis-common-protos; `--imports DIR` puts them where `buf`
finds them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.rpc import status_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
VIRTUAL_ROOT = "lorikeet/protos"
# What is imported, directly or not: the name in imports, and what the package calls the file where that is another.
IMPORTED = {
    "google/longrunning/operations.proto": "google/longrunning/operations_proto.proto",
    "google/api/annotations.proto": "",
    "google/api/client.proto": "",
    "google/api/field_behavior.proto": "",
    "google/api/http.proto": "",
    "google/api/launch_stage.proto": "",
    "google/rpc/status.proto": "",
}


def copy_imports(directory: Path) -> None:
    """Put the imported files into a directory, made if missing."""
    installed = Path(status_pb2.__file__).parents[2]
    for name, file in IMPORTED.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((installed / (file or name)).read_bytes())


def generate(output_root: Path, imports: Path) -> dict[Path, bytes]:
    """Run protoc.

    Args:
        output_root: an empty directory for protoc to write into.
        imports: where the imported files are.

    Returns:
        The generated files by their path relative to protos/.

    Raises:
        RuntimeError: protoc refused a file; its message is on stderr.
    """
    sources = sorted(f"{VIRTUAL_ROOT}/{path.relative_to(PROTOS).as_posix()}" for path in PROTOS.glob("v1/*.proto"))
    # The plugins (protoc-gen-mypy and -mypy_grpc) are scripts of the environment whose interpreter runs this.
    scripts = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"-I{VIRTUAL_ROOT}={PROTOS}",
            f"-I{imports}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={output_root}",
            f"--grpc_python_out={output_root}",
            f"--mypy_out=quiet:{output_root}",
            f"--mypy_grpc_out=quiet:{output_root}",
            *sources,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}")
    root = output_root / VIRTUAL_ROOT
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*_pb2*.py*"))}


def committed() -> dict[Path, bytes]:
    """The stubs as they lie here, by their path relative to protos/."""
    return {path.relative_to(PROTOS): path.read_bytes() for path in sorted(PROTOS.glob("v1/*_pb2*.py*"))}


def main() -> int:
    """Write the stubs, or compare them."""
    parser = argparse.ArgumentParser(description="Generate the Python stubs of protos/v1.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the committed stubs differ")
    parser.add_argument("--imports", type=Path, metavar="DIR", help="only copy the imported files there")
    options = parser.parse_args()
    if options.imports is not None:
        copy_imports(options.imports)
        return 0
    check: bool = options.check
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as imports:
        copy_imports(Path(imports))
        fresh = generate(Path(directory), Path(imports))
    old = committed()
    changed = sorted(path for path in fresh.keys() | old.keys() if fresh.get(path) != old.get(path))
    if check:
        for path in changed:
            sys.stderr.write(f"protos/{path} is not what protos/v1/*.proto generate; run `make proto`.\n")
        return 1 if changed else 0
    for path in changed:
        if path in fresh:
            (PROTOS / path).write_bytes(fresh[path])
        else:
            (PROTOS / path).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
