# SPDX-License-Identifier: Apache-2.0
"""Lab files: the examples are right, and every kind of wrong file gets its place and its words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobictl.document import DocumentError
from mobictl.labfile import load_lab_file, parse_lab_file
from proto.lab import lab_schema
from proto.labcheck import LabError, read_lab, write_lab

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(p for p in (ROOT / "deploy/examples").glob("*.yaml") if "topology:" in p.read_text())

HEAD = "name: t\ntopology:\n  defaults: {image: mini}\n  nodes: {alpha: {}, beta: {}, gamma: {}}\n"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_right_and_survive_the_wire(path: Path) -> None:
    lab, _ = load_lab_file(path)
    assert read_lab(write_lab(lab)) == lab


def test_half_of_a_surrogate_pair_in_a_lab_is_refused() -> None:
    lab = {"name": "t", "topology": {"nodes": {"a": {}}, "links": [{"endpoints": ["\ud800", "a:eth1"]}]}}
    with pytest.raises(LabError, match=r"not a lab as JSON text: .*surrogates not allowed"):
        read_lab(json.dumps(lab))


def test_schema_is_current() -> None:
    published = (ROOT / "deploy/lab.schema.json").read_text()
    assert json.loads(published) == lab_schema(), "run: mobictl lab schema > deploy/lab.schema.json"


# § stands before the place that the error must name (nowhere: the file as a whole).
WRONG = [
    ("", "the file is empty"),
    ("§- a\n", "a lab file is a map with the keys name and topology, not ['a']"),
    ("name: t\n§name: u\n", "the key 'name' is there twice, first at line 1, column 1"),
    ("name: [\n§", "not YAML: while parsing a flow node expected the node content, but found '<stream end>'"),
    ("a: §&a [*a]\n", "this value contains itself by an alias"),
    ("a: §!!python/object:os.system x\n", "the tag !!python/object:os.system is not allowed here"),
    ('name: §"\\ud800"\n', "half of a surrogate pair is no text"),
    ("name: t\nx: §0x" + "f" * 5000, "a number with more than 40 digits"),
    ("[[[[[[[[[[[[[[[[§[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", "nested deeper than 16 levels"),
    ("a: 1\n---\n§b: 1\n", "a second document begins here; a file has one"),
    ("§name: t\n", "the key 'topology' is missing"),
    (
        "name: §../t\ntopology: {nodes: {a: {image: mini}}}\n",
        "'../t' is not a lab's name: 1 to 32 small letters, digits and inner hyphens",
    ),
    (
        "name: §<b>t</b>\ntopology: {nodes: {a: {image: mini}}}\n",
        "'<b>t</b>' is not a lab's name: 1 to 32 small letters, digits and inner hyphens",
    ),
    (
        "name: §default\ntopology: {nodes: {a: {image: mini}}}\n",
        "'default' is the lab of guests made by vm run; choose another name",
    ),
    ("name: t\ntopology: {nodes: §{}}\n", "expected at least 1 entry, not 0"),
    (
        "name: t\ntopology: {nodes: {§a/b: {image: mini}}}\n",
        "'a/b' is not a guest's name: 1 to 32 small letters, digits and inner hyphens",
    ),
    ("name: t\ntopology: {nodes: {a: §{}}}\n", "the guest 'a' has no image, nor is there a default one"),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, §memroy: 64M}\n",
        "unknown key 'memroy'; did you mean 'memory'?",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, memory: §64X}\n",
        "'64X' has an unknown unit 'X'; a size has K, M, G or T, as in 64M",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, memory: §1M}\n",
        "1M is outside of what the memory of a guest can be (16M to 1T)",
    ),
    ("name: t\ntopology:\n  nodes:\n    a: {image: mini, §ports: [80]}\n", "'ports' is not supported yet"),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, §checkpoint: 1h}\n",
        "'checkpoint' is not supported yet",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, cpus: §2}\n",
        "more than one CPU per guest is not supported yet",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, restart-policy: §sometimes}\n",
        "expected 'never', 'on-failure' or 'always', not 'sometimes'",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, env: {§A B: x}}\n",
        "'A B' is not an environment variable's name: letters, digits and underscores",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, place: §{sit: x}}\n",
        "expected a peer's name or {site: NAME}",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, mtu: §64}\n",
        "64 is outside of what an MTU can be (576 to 9000)",
    ),
    ("name: t\ntopology:\n  nodes:\n    a: §mini\n", "expected a map of keys and values, not 'mini'"),
    (
        HEAD + '  links: [{endpoints: ["alpha:eth1", §"betta:eth1"]}]\n',
        "there is no node 'betta'; did you mean 'beta'?",
    ),
    (
        HEAD + '  links: [{endpoints: ["alpha:eth1", §"xyz:eth1"]}]\n',
        "there is no node 'xyz'; the nodes are alpha, beta, gamma",
    ),
    (HEAD + '  links: [{endpoints: §["alpha:eth1"]}]\n', "expected at least 2 entries, not 1"),
    (
        HEAD + '  links: [{endpoints: [§"alpha", "beta:eth1"]}]\n',
        "'alpha' is not an endpoint; write NODE:INTERFACE, as in alpha:eth1",
    ),
    (
        HEAD + '  links: [{endpoints: [§"alpha:eth/1", "beta:eth1"]}]\n',
        "'eth/1' is not an interface's name; write eth1, eth2 … (at most 15 characters)",
    ),
    (
        HEAD + '  links: [{endpoints: [§"alpha:lo", "beta:eth1"]}]\n',
        "'lo' is not an interface's name; write eth1, eth2 … (at most 15 characters)",
    ),
    (
        HEAD + '  links: [{endpoints: §["alpha:eth1", "alpha:eth2"]}]\n',
        "both ends of the link are at 'alpha'",
    ),
    (
        HEAD + '  links:\n  - {endpoints: ["alpha:eth1", "beta:eth1"]}\n'
        '  - {endpoints: [§"alpha:eth1", "gamma:eth1"]}\n',
        "the endpoint 'alpha:eth1' is used twice, first in links[0].endpoints[0]",
    ),
    (
        HEAD + '  links:\n  - {endpoints: ["alpha:eth1", "beta:eth1"], name: n}\n'
        '  - {endpoints: ["alpha:eth2", "gamma:eth1"], name: §n}\n',
        "the network name 'n' is taken twice",
    ),
    (
        HEAD + '  links:\n  - {endpoints: ["alpha:eth1", "beta:eth1"], subnet: 10.1.0.0/16}\n'
        '  - {endpoints: ["alpha:eth2", "gamma:eth1"], subnet: §10.1.2.0/24}\n',
        "10.1.2.0/24 overlaps with 10.1.0.0/16 of links[0]",
    ),
    (
        HEAD + "  networks: {lan: {members: [alpha, beta, gamma], subnet: §10.1.0.0/31}}\n",
        "10.1.0.0/31 is exhausted: it has 2 addresses for guests, 3 are wanted",
    ),
    (
        HEAD + "  networks: {lan: {members: [alpha, §alpha]}}\n",
        "'alpha' is a member of the network 'lan' twice",
    ),
    (
        HEAD + "  networks: {lan: {members: [alpha], subnet: §10.1.0.7/24}}\n",
        "'10.1.0.7/24' is an address in a subnet; the subnet itself is 10.1.0.0/24",
    ),
    (
        HEAD + "  networks: {lan: {members: [alpha], subnet: §127.0.0.0/8}}\n",
        "'127.0.0.0/8' cannot be used for guests (it is a multicast, loopback or unspecified range)",
    ),
    (
        HEAD + '  links: [{endpoints: ["alpha:eth1", "beta:eth1"], delay: §50}]\n',
        "50 needs a unit; write for example 50ms or 50s",
    ),
    (
        HEAD + '  links: [{endpoints: ["alpha:eth1", "beta:eth1"], rate: §20}]\n',
        "20 needs a unit; write for example 20mbit or 20MB/s",
    ),
    (
        HEAD + '  links: [{endpoints: ["alpha:eth1", "beta:eth1"], loss: §0.1}]\n',
        "0.1 needs a percent sign; write for example 0.1%",
    ),
    (
        HEAD + '  links: [{endpoints: ["alpha:eth1", "beta:eth1"], jitter: §1ms}]\n',
        "jitter cannot be more than the delay (a frame cannot arrive early)",
    ),
    (
        HEAD + "  networks: {lan: {members: [beta:eth1, §beta:eth1]}}\n",
        "the endpoint 'beta:eth1' is used twice, first in networks.lan.members[0]",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, scale: §0}\n",
        "expected at least 1, not 0",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a-2: {image: mini}\n    a: {image: mini, scale: §3}\n",
        "'a' stands for 'a-2' too, which is a node of its own",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, scale: 3}\n    b: {image: mini}\n"
        '  links: [{endpoints: [§"a:eth1", "b:eth1"]}]\n',
        "'a' has the scale 3, and a link joins two guests; name one of them, as a-1:eth1, "
        "or put a on a network",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: {image: mini, scale: 3}\n"
        '  networks: {lan: {members: ["a", §"a-2"]}}\n',
        "'a-2' is a member of the network 'lan' twice",
    ),
    (
        "name: t\ntopology:\n  nodes:\n    a: §{scale: 3}\n",
        "the guest 'a-1' has no image, nor is there a default one",
    ),
    (HEAD + "    # 0\n    # 1\n  §link: []\n", "unknown key 'link'; did you mean 'links'?"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_wrong_file_gets_place_and_words(text: str, words: str) -> None:
    before, mark, _ = text.partition("§")
    line = before.count("\n") + 1 if mark else 0
    column = len(before) - before.rfind("\n") if mark else 0
    with pytest.raises(DocumentError) as error:
        parse_lab_file(text.replace("§", ""), "t.yaml")
    first = error.value.findings[0]
    assert (first.line, first.column, first.message) == (line, column, words)


def test_every_mistake_is_told_at_once_in_the_order_of_the_file() -> None:
    text = HEAD + '  links: [{endpoints: ["alpha:eth1", "x"], delay: 1}, {endpoints: []}]\n'
    with pytest.raises(DocumentError) as error:
        parse_lab_file(text.replace("{image: mini}", "{imag: mini}"), "t.yaml")
    assert [finding.line for finding in error.value.findings] == [3, 5, 5, 5]
    assert str(error.value).startswith(
        "t.yaml:3:14: unknown key 'imag'; did you mean 'image'?\n     3 |   defaults"
    )


def test_alias_bomb_is_refused() -> None:
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 9):
        levels.append(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]")
    with pytest.raises(DocumentError, match="expand to too many values"):
        parse_lab_file("\n".join(levels), "t.yaml")


def test_merge_keys_and_anchors_work() -> None:
    text = (
        "name: t\ntopology:\n  nodes:\n    a: &a {image: mini, memory: 32M}\n    b: {<<: *a, memory: 64M}\n"
    )
    lab, _ = parse_lab_file(text, "t.yaml")
    assert (lab.topology.nodes["b"].image, lab.topology.nodes["b"].memory) == ("mini", 64 << 20)


def test_large_and_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no such file or directory"):
        load_lab_file(tmp_path / "none.yaml")
    with pytest.raises(DocumentError, match="is a directory"):
        load_lab_file(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(DocumentError, match="larger than 1 MiB"):
        load_lab_file(big)
    big.write_bytes(b"name: \xff\n")
    with pytest.raises(DocumentError, match=r"1:7: not UTF-8 text"):
        load_lab_file(big)
