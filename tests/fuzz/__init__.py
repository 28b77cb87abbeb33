# SPDX-License-Identifier: Apache-2.0
"""Every parser of what comes from outside, given inputs that nobody would think of.

A *fuzzer* runs a parser thousands of times a second on inputs that it makes itself. It starts from valid
ones, changes them a little, and keeps each change that took a branch no input had taken before; so it finds
its way into a format step by step, and to the one value that somebody forgot. Both fuzzers here are
libFuzzer: for Python with atheris, which watches the branches of the byte code; for the C helper with clang,
whose sanitizers end the process at a byte read outside its buffer or a number that overflows.

A *target* is one parser and what must hold of it: it refuses with its documented errors and with nothing
else, and what it accepts is written by the encoder and read again as the same. The Python targets are in this
package, by where their bytes come from: `network`, `gossip`, `guests`, `disk`, `files`, `people`; `machines`
has those that go on to the machine behind the parser. What a target is stands in `target`. The helper's are
in `kernel/helper/fuzz/`, their first inputs in `helper`. Where a checksum or a seal stands before a parser,
the target makes it right: it is no secret, or its holder is the one who must not be trusted.

`make fuzz T=60` runs each for that many seconds (`__main__`). A finding is kept as
`build/fuzz/NAME/crash-…`, told with the command that replays it, and tried again by the next run. The last
line is JSON. What was found becomes a test in `tests/unit`, and stays there.

A new parser gets a function with `@target(…)` here, or a file in `kernel/helper/fuzz/`.
"""
