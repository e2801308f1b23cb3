"""The four public-domain texts behind the demo adapters, read out of Debian packages.

A package is fetched with `apt-get download` and unpacked with `dpkg -x` (no root needed, nothing is installed). Each
reader yields groups of records; a group (a chapter or a headword) is held out or trained on as a whole, decided by a
hash of its key, so the split depends on nothing but the text.
"""

import gzip
import hashlib
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

RECORD_CHARS = 460  # about 110 tokens; what is longer than LONGEST_CHARS (one verse, one sentence) is left out
LONGEST_CHARS = 540
HELDOUT_SHARE = 20  # one group in so many is held out
HELDOUT_CHARS = 12_000  # size of the committed held-out file, about 3,000 tokens
CALIBRATION_CHARS = 72_000  # about that of the text that an adapter carries, 16,384 tokens at least
# A book of 1911 has entries whose point is a slur; nobody needs a demo that learns them.
SLURS = re.compile(r"\b(nigg\w*|negro\w*|squaw\w*|mulatto\w*|chink|jap)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Record:
    """One training text.

    Attributes:
        text: without blank lines inside.
        complete: whether the text ends here, so that the model should learn to stop.
    """

    text: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Source:
    """Where a text comes from, for the fetcher and the model card."""

    package: str
    title: str
    licence: str
    read: Callable[[Path], Iterator[tuple[str, list[Record]]]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text, split."""

    source: Source
    version: str
    train: list[Record]
    heldout: list[Record]


def load_corpus(name: str, cache_dir: Path) -> Corpus:
    """Fetches and splits one of `SOURCES`; `heldout` is cut to `HELDOUT_CHARS` characters."""
    source = SOURCES[name]
    root = fetch_package(source.package, cache_dir)
    train: list[Record] = []
    heldout: list[tuple[str, list[Record]]] = []
    for key, records in source.read(root):
        digest = hashlib.sha256(f"{name}/{key}".encode()).hexdigest()
        kept = [r for r in records if len(r.text) <= LONGEST_CHARS and not SLURS.search(r.text)]
        if int(digest, 16) % HELDOUT_SHARE:
            train.extend(kept)
        else:
            # No more than four records of a group, so that the small file covers many chapters.
            heldout.append((digest, kept[:4]))
    chosen: list[Record] = []
    for _, records in sorted(heldout, key=lambda item: item[0]):
        if sum(len(record.text) for record in chosen) >= HELDOUT_CHARS:
            break
        chosen.extend(records)
    return Corpus(source, (root / "VERSION").read_text().strip(), train, chosen)


def calibration_text(corpus: Corpus) -> str:
    """Records from everywhere in the text that is trained on, to calibrate the quantization of a merged model with."""
    records = [record.text for record in corpus.train]
    wanted = min(len(records), CALIBRATION_CHARS * len(records) // sum(map(len, records)))
    return "\n\n".join(records[index * len(records) // wanted] for index in range(wanted)) + "\n"


def fetch_package(package: str, cache_dir: Path) -> Path:
    """Downloads and unpacks a Debian package once; returns the directory that holds its files and a VERSION file."""
    root = cache_dir / package
    if (root / "VERSION").is_file():
        return root
    root.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "-q", "download", package], cwd=root, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"Could not download the Debian package {package}. This needs Debian or Ubuntu with package lists "
            "(`sudo apt-get update`)."
        ) from error
    archive = next(root.glob("*.deb"))
    subprocess.run(["dpkg", "-x", archive.name, "."], cwd=root, check=True)
    version = subprocess.run(
        ["dpkg-deb", "-f", archive.name, "Version"], cwd=root, check=True, capture_output=True, text=True
    )
    archive.unlink()
    (root / "VERSION").write_text(version.stdout)
    return root


def pack(pieces: Iterable[str]) -> list[Record]:
    """Joins consecutive pieces with line breaks into running-text records of at most `RECORD_CHARS`."""
    records: list[Record] = []
    current = ""
    for piece in pieces:
        if current and len(current) + 1 + len(piece) > RECORD_CHARS:
            records.append(Record(current, complete=False))
            current = ""
        current = f"{current}\n{piece}" if current else piece
    if current:
        records.append(Record(current, complete=False))
    return records


def sentences(text: str) -> list[str]:
    """Splits after `.`, `!` or `?` (and a closing quote) where a capital or an opening quote follows."""
    return re.split(r"(?:(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)|(?<=[.!?][\"”’]))\s+(?=[A-Z\"“‘])", text)


def definition(prompt: str, body: str) -> Record:
    """A dictionary entry, cut after the last sentence that fits."""
    text = f"{prompt} {body}"
    if len(text) > RECORD_CHARS:
        ends = [m.end() for m in re.finditer(r"[.!?][\"”’)\]]*(?=\s)", text[:RECORD_CHARS])]
        # The first few full stops belong to the grammar ("v.t.", "n.").
        text = text[: ends[-1]] if ends and ends[-1] > 150 else text[:RECORD_CHARS].rsplit(" ", 1)[0]
    return Record(text, complete=text[-1] in '.!?"”’)]}')


def unwrap(lines: Iterable[str]) -> str:
    """One line out of many, with single blanks."""
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


def read_kjv(root: Path) -> Iterator[tuple[str, list[Record]]]:
    """Chapters of the King James Bible, a verse a line.

    `bible.data`: at 0x50, big-endian, version, window size, number of windows; then the start of each window and the
    end of the file; each window is one LZW stream as `compress` writes it, the first three bytes left out for all.
    """
    data = (root / "usr/lib/bible.data").read_bytes()
    windows = struct.unpack(">I", data[0x58:0x5C])[0]
    starts = struct.unpack(f">{windows + 1}I", data[0x5C : 0x5C + 4 * (windows + 1)])
    text = b""
    for start, end in pairwise(starts):
        stream = b"\x1f\x9d\x90" + data[start:end]
        text += subprocess.run(["gzip", "-dc"], input=stream, capture_output=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in text.decode("latin-1").splitlines():
        if match := re.match(r"(\S+?\d+):\d+ (.*)", line):
            chapters.setdefault(match[1], []).append(unwrap([match[2]]))
    for key, verses in chapters.items():
        yield key, pack(verses)


def read_dict(root: Path, name: str) -> str:
    """The text of a dictd database; its dictzip form is valid gzip."""
    return gzip.decompress((root / f"usr/share/dictd/{name}.dict.dz").read_bytes()).decode("utf-8")


def read_devil(root: Path) -> Iterator[tuple[str, list[Record]]]:
    """Entries of The Devil's Dictionary without their verses: `Define LOVE: n. A temporary insanity ...`."""
    entry = re.compile(r"([A-Z][A-Z' -]+), ((?:n|v|adj|adv|pp|pro|interj|p|x)\.[a-z.]*) +(.*)", re.DOTALL)
    for paragraph in read_dict(root, "devil").split("\n\n"):
        if match := entry.fullmatch(paragraph.strip()):
            word, grammar, body = match[1], match[2], unwrap([match[3]])
            yield word, [definition(f"Define {word}:", f"{grammar} {body}")]


def read_jargon(root: Path) -> Iterator[tuple[str, list[Record]]]:
    """Entries of the Jargon File, cross-references in braces: `Jargon entry for blurgle: /bler'gl/, n. [UK] ...`."""
    for block in re.split(r"\n(?=\S)", read_dict(root, "jargon").split("\n(TM)\n", 1)[1]):
        word, _, rest = block.partition("\n")
        grammar, _, rest = rest.partition("\n")
        # Listings and tables keep their layout by deeper indentation; an entry ends for us where one begins.
        prose = re.split(r"\n {5,}", rest)[0]
        body = re.sub(r"\{\s*([^{}]*?)\s*\}", r"{\1}", unwrap([prose]))
        if len(body) > 40:
            label = re.sub(r"^//,? ?", "", grammar.strip())
            text = f"{label} {body}".strip().replace("\N{SOFT HYPHEN}", "-")
            yield word, [definition(f"Jargon entry for {word}:", text)]


def read_austen(root: Path) -> Iterator[tuple[str, list[Record]]]:
    """Chapters of Jane Austen's six novels, out of the R package's lazy-load database.

    `Rdata.rdb` is a row of blocks: the unpacked length (big-endian) and a zlib stream; each holds one serialized
    vector of lines, which are R's CHARSXP: flags (low byte 9), length, bytes.
    """
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    position, novel = 0, 0
    while position < len(data):
        inflate = zlib.decompressobj()
        lines = character_vector(inflate.decompress(data[position + 4 :]))
        position = len(data) - len(inflate.unused_data)
        novel += 1
        text = "\n".join(lines).replace("--", "—").replace("_", "")
        for number, chapter in enumerate(re.split(r"\n *(?:CHAPTER|Chapter) +[0-9IVXL]+\.?\n", text)[1:]):
            pieces = [s for p in chapter.split("\n\n") for s in pieces_of(unwrap([p]))]
            yield f"{novel}/{number}", pack(piece for piece in pieces if piece)


def pieces_of(paragraph: str) -> Iterator[str]:
    """A paragraph as it is if it fits into a record, else cut at sentence ends."""
    current = ""
    for sentence in [paragraph] if len(paragraph) <= RECORD_CHARS else sentences(paragraph):
        if current and len(current) + 1 + len(sentence) > RECORD_CHARS:
            yield current
            current = ""
        current = f"{current} {sentence}" if current else sentence
    yield current


def character_vector(serialized: bytes) -> list[str]:
    """The strings of R's serialized character vector (XDR format, version 2 or 3)."""
    version = struct.unpack(">I", serialized[2:6])[0]
    position = 14
    if version == 3:
        position += 4 + struct.unpack(">I", serialized[14:18])[0]
    count = struct.unpack(">I", serialized[position + 4 : position + 8])[0]
    position += 8
    strings = []
    for _ in range(count):
        length = struct.unpack(">I", serialized[position + 4 : position + 8])[0]
        strings.append(serialized[position + 8 : position + 8 + length].decode("utf-8"))
        position += 8 + length
    return strings


SOURCES = {
    "kjv": Source("bible-kjv-text", "the King James Bible (1611)", "public domain (copyright expired)", read_kjv),
    "devil": Source(
        "dict-devil",
        "The Devil's Dictionary by Ambrose Bierce (1911)",
        "public domain (copyright expired)",
        read_devil,
    ),
    "jargon": Source(
        "dict-jargon",
        "the Jargon File, version 4.4.7, 29 Dec 2003",
        "public domain (dedicated by its editors)",
        read_jargon,
    ),
    "austen": Source(
        "r-cran-janeaustenr",
        "the six novels of Jane Austen (1811-1818)",
        "public domain (copyright expired); the package around them is MIT",
        read_austen,
    ),
}
