"""What is compared with an allowed prefix is what is fetched, and nothing outside the prefixes is ever located."""

import posixpath
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from lorikeet.adapters.errors import AdapterIdError, AdapterNotFoundError, AdapterSourceError
from lorikeet.adapters.sources.locate import RemoteSource, SourcePolicy, locate
from lorikeet.adapters.sources.uri import MAX_URI_CHARS, MalformedUriError, parse_prefix, parse_uri

ALLOWED = ("hf://my-org/", "hf://birds/lory@v1", "s3://bucket/adapters", "gs://bucket/a/b/", "https://host:8443/x/")
ALLOWED_FOLDERS = ("hf://my-org/", "s3://bucket/adapters/", "gs://bucket/a/b/", "https://host:8443/x/")
POLICY = SourcePolicy([], ALLOWED)

# Pieces that mean something to one URI parser or another.
PIECES = st.sampled_from(
    [
        *ALLOWED,
        *("hf", "s3", "gs", "http", "https", "file", "://", ":", "//", "/", "\\", ".", "..", "/../", "/./", "%2e%2e"),
        *(
            "%2f",
            "%",
            "@",
            "@v1",
            "?",
            "#",
            ";",
            "&",
            "=",
            "+",
            "~",
            "*",
            "[::1]",
            "\0",
            "\n",
            "\t",
            " ",
            "é",
            "／",
            "．",
        ),
        *("my-org", "birds", "lory", "bucket", "host", ":8443", ":443", "adapters", "x", "a", "b", "-evil", "evil.com"),
    ]
)
URIS = st.lists(st.one_of(PIECES, PIECES, st.text(max_size=5)), min_size=1, max_size=10).map("".join)
SEGMENT = st.from_regex(r"[A-Za-z0-9._~+=,@:-]{1,20}", fullmatch=True).filter(lambda text: text not in (".", ".."))
HUB_NAME = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._]{0,20}[A-Za-z0-9])?", fullmatch=True).filter(
    lambda text: ".." not in text
)


def is_allowed_folder(uri):
    """As another parser sees it: decoded and normalised, the folder lies under an allowed one."""
    parts = urlsplit(uri)
    path = posixpath.normpath(unquote(parts.path)) if parts.path else ""
    if parts.query or parts.fragment or parts.username or parts.password:
        return False
    whole = f"{parts.scheme}://{parts.netloc}{path}"
    return whole == "hf://birds/lory@v1" or f"{whole}/".startswith(ALLOWED_FOLDERS)


@given(URIS)
@example("s3://bucket/adapters-evil/x")
@example("s3://bucket-evil/adapters/x")
@example("s3://bucket/adapters/../secret")
@example("s3://bucket/adapters/%2e%2e/secret")
@example("s3://bucket/adapters/..%2fsecret")
@example("s3://bucket/adapters\\..\\secret")
@example("https://host:8443@evil.com/x/a")
@example("https://host:8443/x/a?next=https://evil.com")
@example("https://host:8443\\@evil.com/x/a")
@example("https://host:8443.evil.com/x/a")
@example("https://host/x/a")
@example("http://host:8443/x/a")
@example("hf://my-org-evil/a")
@example("hf://my-org/a@refs/pr/7")
@example("hf://my-org/../evil/a")
@example("hf://birds/lory@v1-evil")
@example("hf://birds/lory")
def test_nothing_outside_the_prefixes_is_located(uri):
    try:
        source = locate(POLICY, "a", uri)
    except (AdapterSourceError, AdapterIdError, AdapterNotFoundError) as error:
        assert len(error.message) < 2000
        return
    assert isinstance(source, RemoteSource)
    assert is_allowed_folder(source.uri)
    assert source.uri.lower() == uri.removesuffix("/").lower()  # nothing was decoded, resolved or dropped
    assert parse_uri(source.uri) == source.location


@given(st.sampled_from(ALLOWED_FOLDERS[1:]), st.lists(SEGMENT, max_size=5), st.booleans())
def test_every_plain_folder_under_a_prefix_is_located(prefix, segments, slash):
    uri = prefix + "/".join(segments)
    assume(len(uri) < MAX_URI_CHARS)
    located = locate(POLICY, "a", uri.rstrip("/") + "/" * slash)
    assert located.uri == uri.rstrip("/")
    with pytest.raises(AdapterSourceError):
        locate(POLICY, "a", prefix.rstrip("/") + "-evil/" + "/".join(segments))


@given(HUB_NAME, st.one_of(st.none(), HUB_NAME))
def test_every_repository_of_an_allowed_organisation_is_located(name, revision):
    uri = f"hf://my-org/{name}" + (f"@{revision}" if revision else "")
    assert locate(POLICY, "a", uri).uri == uri
    with pytest.raises(AdapterSourceError):
        locate(POLICY, "a", f"hf://my-org{name}/{name}")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("HTTPS://Host.Example:443/a/", "https://host.example/a"),
        ("http://127.0.0.1:80", "http://127.0.0.1"),
        ("http://my_store:9000/x", "http://my_store:9000/x"),
        ("https://host:80/x", "https://host:80/x"),
        ("S3://bucket/Some/Key=1/", "s3://bucket/Some/Key=1"),
        ("s3://bucket", "s3://bucket"),
        ("gs://under_score/x", "gs://under_score/x"),
        ("hf://Org/Name.v1_x/", "hf://Org/Name.v1_x"),
        ("hf://org/name@v1.0", "hf://org/name@v1.0"),
    ],
)
def test_normal_form(text, normal):
    assert str(parse_uri(text)) == normal
    assert parse_uri(normal) == parse_uri(text)


MALFORMED = """
    file:///etc/passwd ftp://host/x memory://x s3a://bucket/x s3::https://host/x ://x/y x://user:pw@host/x
    s3:// s3:///x gs:// http:// https:///x hf:// hf://org hf://org/ hf://org/a/b
    s3://B/x s3://bucket_/x s3://b/x s3://-bucket/x s3://bucket:x/y s3://key:secret@bucket/x
    s3://arn:aws:s3:us-east-1:123456789012:accesspoint/x s3://bucket/a?versionId=1 gs://bucket/a#1
    s3://bucket//x s3://bucket/x// s3://bucket/./x s3://bucket/x/.. s3://bucket/* s3://bucket/a\\b s3://bucket/é
    https://user:pw@host/x https://user@host/x https://host:/x https://host:0/x https://host:65536/x https://host:x/y
    https://[::1]/x https://höst/x https://host./x https://.host/x https://-host/x https://a..b/x
    https://host/x? https://host/x# https://host/%41 https://host/x;y https://host/?sig=secret
    hf://org/name@ hf://org/name@a/b hf://org/name@refs/pr/1 hf://org/name@a@b hf://@v1 hf://org@v1 hf://org/name@v..1
    hf://org/na--me hf://org/.. hf://org/na..me hf://user:pw@org/name hf://org//x hf://org/name/@v1
"""


@pytest.mark.parametrize(
    "uri",
    [
        *MALFORMED.split(),
        "https://ho st/x",
        "\nhttps://user:pw@host/x",
        *("https://host/" + "x" * n for n in (256, 2000)),
    ],
)
def test_malformed_uris_are_refused_and_not_repeated(uri):
    with pytest.raises(AdapterSourceError) as error:
        locate(SourcePolicy([], ["hf://", "s3://", "gs://", "https://host/"]), "a", uri)
    assert len(error.value.message) < 300
    for secret in ("pw", "secret", "user", "versionId"):
        assert secret not in error.value.message


@pytest.mark.parametrize("prefix", ["http://", "https://", "https:///", "file://", "hf:", "", "s3://bucket/..", "x"])
def test_malformed_prefixes_are_refused(prefix):
    with pytest.raises(MalformedUriError):
        parse_prefix(prefix)
    with pytest.raises(ValueError, match="Prefix 2 of --adapter-sources"):
        SourcePolicy([], ["hf://", prefix])


@pytest.mark.parametrize(
    ("prefix", "uri", "allowed"),
    [
        ("hf://", "hf://any/thing@v1", True),
        ("hf://org", "hf://org/name", True),
        ("hf://org/name", "hf://org/name@v2", True),
        ("hf://org/name@v1", "hf://org/name@v1", True),
        ("hf://org/name@v1", "hf://org/name", False),
        ("hf://org/name", "hf://org/name2", False),
        ("s3://", "s3://any-bucket/x", True),
        ("s3://", "gs://any-bucket/x", False),
        ("s3://bucket", "s3://bucket", True),
        ("s3://bucket/a", "s3://bucket", False),
        ("s3://bucket/a", "s3://bucket/A", False),
        ("https://host", "https://host:443/x", True),
        ("https://host", "https://host:8443/x", False),
        ("https://host", "http://host/x", False),
        ("https://HOST/", "https://host/x", True),
        ("https://host", "https://sub.host/x", False),
    ],
)
def test_prefixes_are_compared_by_whole_segments(prefix, uri, allowed):
    assert parse_uri(uri).is_within(parse_prefix(prefix)) is allowed
