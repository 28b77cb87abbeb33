# SPDX-License-Identifier: Apache-2.0
"""One Python target under atheris: `python -m tests.fuzz.python NAME [options of libFuzzer]`.

Atheris tells libFuzzer which branches an input took, so inputs that reach something new are kept and changed
further. For that the modules under test must be instrumented as they are imported.
"""

from __future__ import annotations

import logging
import random
import sys
from typing import Any

import atheris
import structlog

UNDER_TEST = ["proto", "mobid", "mobictl", "tests.fuzz.planted"]
with atheris.instrument_imports(include=UNDER_TEST):
    from tests.fuzz.registry import TARGETS
    from tests.fuzz.target import Form, altered


def _mutator(form: Form) -> Any:
    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        made = altered(form, data, rng) if rng.random() < 0.5 else None
        if made and len(made) <= most:
            return made
        mutated: bytes = atheris.Mutate(data, most)
        return mutated

    return mutate


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    target = TARGETS[sys.argv[1]]
    options = {"custom_mutator": _mutator(target.form)} if target.form else {}
    atheris.Setup([sys.argv[0], f"-max_len={target.longest}", *sys.argv[2:]], target.run, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
