"""Show that the tests bite: break the kernels in one small way at a time, and see that a test fails.

    python tests/host_cuda/mutations.py              # all, some 20 minutes of one core
    python tests/host_cuda/mutations.py barrier sign # those whose name contains a word
    python tests/host_cuda/mutations.py --list

Each mutation replaces one piece of text in a copy of kernels/ and csrc/, and the host_cuda back end of the
operator tests runs on that copy. A mutation that no test notices is a gap in the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from host_cuda_library import ROOT, ROOT_VARIABLE

OPERATORS = "tests/ops/"
ATTENTION, ASSIGN = OPERATORS + "test_group_attention.py", OPERATORS + "test_gumbel_assign.py"
TILED = "tests/host_cuda/test_tiled_kernels.py"
MASKS = "tests/host_cuda/test_mask_kernels.py"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file: str, *tests: str):
    return lambda name, old, new: Mutation(name, file, old, new, tests)


_attention = _of("kernels/group_attention.cuh", ATTENTION)
_assign = _of("kernels/gumbel_assign.cuh", TILED, ASSIGN)
_backward = _of("kernels/gumbel_assign_backward.cuh", ASSIGN)
_philox = _of("kernels/philox.cuh", ASSIGN)
_pairs = _of("kernels/token_group.cuh", ATTENTION, ASSIGN)
_tile = _of("kernels/tile.cuh", ATTENTION, ASSIGN)
_mma = _of("kernels/mma.cuh", ATTENTION)
_masks = _of("kernels/mask_upsample.cuh", MASKS)

MUTATIONS = [
    _attention(
        "attention: sign of the rescaling", "exp2f(maximum[half] - largest)", "exp2f(largest - maximum[half])"
    ),
    _attention(
        "attention: tile edge of the tokens",
        "fragment_column(n, i) < columns",
        "fragment_column(n, i) <= columns",
    ),
    _attention(
        "attention: missing barrier between work items", "p.tokens);\n        GVIT_SYNC();", "p.tokens);"
    ),
    _attention("attention: lse in the wrong unit", "log2f(total)) * kLn2", "log2f(total))"),
    _attention("attention: sign of D", "(values[1].value[n][i] - mean)", "(values[1].value[n][i] + mean)"),
    _attention(
        "attention: scale forgotten in the gradient", "static_cast<float>(p.scale) * values[1]", "values[1]"
    ),
    _attention("attention: no rescaling of the sum", "sum[half] *= shrink[half];", ""),
    _philox("philox: a round too few", "kPhiloxRounds = 10", "kPhiloxRounds = 9"),
    _philox("philox: wrong key step", "key1 += kPhiloxWeyl1", "key1 += kPhiloxWeyl0"),
    _philox("philox: wrong bits of a word", "word >> 8", "word >> 7"),
    _assign("noise: wrong counter", "* tokens + token)", "* tokens + token + 1)"),
    _assign("noise: the same for all samples", "(sample * quads + quad)", "(quad)"),
    _assign("noise: words in the wrong order", "noise.word[w]", "noise.word[3 - w]"),
    _assign("assign: sign of the bias", "(product + bias)", "(product - bias)"),
    _assign("assign: tau only on the noise", "+ noise) * inverse_tau", "+ noise * inverse_tau)"),
    _assign("assign: ties to the highest group", "other.group < group", "other.group > group"),
    _assign(
        "assign: inf - inf",
        "(sum == 0.0f ? 0.0f : sum * expf(value - largest))",
        "sum * expf(value - largest)",
    ),
    _assign(
        "assign: only -inf is not NaN", "value == -HUGE_VALF ? NAN : value + logf(sum)", "value + logf(sum)"
    ),
    _assign("assign: tile edge of the groups", "first + k < groups ? values", "first + k <= groups ? values"),
    _assign(
        "assign: missing barrier before the counts",
        "});\n        GVIT_SYNC();\n        PairSum",
        "});\n        PairSum",
    ),
    _assign("assign: one tile of weights instead of two", "token / kPairTile % 2 *", "0 *"),
    _assign("assign: a token without a softmax ignored", "lse == lse ? 0.0f : NAN", "0.0f"),
    _assign(
        "assign: eps forgotten",
        "(static_cast<float>(count) + static_cast<float>(p.eps))",
        "static_cast<float>(count)",
    ),
    _assign(
        "assign: count of the wrong group",
        "if (winner >= 0 && winner < kPairTile)",
        "if (winner >= 0 && winner + 1 < kPairTile)",
    ),
    _backward(
        "assign gradient: sign of D", "(values[1].value[n][i] - mean)", "(values[1].value[n][i] + mean)"
    ),
    _backward("assign gradient: sign of the token term", "- term[i / 2])", "+ term[i / 2])"),
    _backward(
        "assign gradient: eps forgotten",
        "[sample * groups + group] + static_cast<float>(p.eps);",
        "[sample * groups + group];",
    ),
    _backward("assign gradient: sign of the count's", "of_output - static", "of_output + static"),
    _backward("assign gradient: tau forgotten", "/ static_cast<float>(p.tau);", ";"),
    _backward(
        "assign gradient: wrong winner",
        "static_cast<int>(p.index[sample * tokens + token])",
        "static_cast<int>(p.index[sample * tokens])",
    ),
    _backward("assign gradient: edge of the channels", "column < channels", "column <= channels"),
    _pairs(
        "pairs: wrong order of groups",
        "8 * (r % 8 / 2) + 2 * (r % 32 / 8)",
        "8 * (r % 32 / 8) + 2 * (r % 8 / 2)",
    ),
    _pairs(
        "pairs: missing barrier before weights are written", "GVIT_SYNC();\n        auto rows", "auto rows"
    ),
    _pairs(
        "pairs: missing barrier in the token terms",
        "GVIT_SYNC();\n    GVIT_UNROLL\n    for (int h = 0; h < 2; ++h) term",
        "GVIT_UNROLL\n    for (int h = 0; h < 2; ++h) term",
    ),
    _pairs(
        "pairs: missing barrier between tiles of tokens",
        "GVIT_SYNC();\n            PairValues values",
        "PairValues values",
    ),
    _pairs("pairs: half of the tokens in the sums of weights", " + values[0].value[k / 2][2 + k % 2];", ";"),
    _pairs(
        "pairs: last partial tile of tokens",
        "token < op.tokens; token += kPairTile",
        "token + kPairTile <= op.tokens; token += kPairTile",
    ),
    _pairs(
        "pairs: a shuffle that some lanes miss",
        "        term[h] += shuffle_xor(term[h], 2);",
        "        if (lane_index() < 16) term[h] += shuffle_xor(term[h], 2);",
    ),
    _tile(
        "tile: edge of the rows",
        "const bool inside = row < from.rows && column < from.columns;\n            async",
        "const bool inside = row <= from.rows && column < from.columns;\n            async",
    ),
    _tile(
        "tile: edge of the columns",
        "inside ? from.row(row)[column]",
        "row < from.rows ? from.row(row)[column]",
    ),
    _tile("tile: a wait too short", "async_wait<kSlots - 2>()", "async_wait<kSlots - 1>()"),
    _tile("tile: missing barrier of the pipeline", "GVIT_SYNC();\n        const int slot", "const int slot"),
    _tile("tile: the slot in use is filled", "start((slot + kSlots - 1) % kSlots)", "start(slot)"),
    _tile(
        "tile: wrong exchange of words",
        "upper ? word[i] : word[i + 2], 2",
        "upper ? word[i] : word[i + 2], 1",
    ),
    _tile("tile: a row too many stored", "row >= to.rows", "row > to.rows"),
    Mutation(
        "tile: 32-bit offset of a sample",
        "kernels/tile.cuh",
        "sample * from.batch",
        "static_cast<int>(sample * from.batch)",
        (TILED,),
    ),
    _mma(
        "mma: matrices of A in the wrong order",
        "a + (8 * bit0 + within) * a_stride + 8 * bit1",
        "a + (8 * bit1 + within) * a_stride + 8 * bit0",
    ),
    _mma(
        "mma: matrices of B in the wrong order",
        "b + (8 * bit0 + within) * b_stride + 8 * bit1",
        "b + (8 * bit1 + within) * b_stride + 8 * bit0",
    ),
    _mma(
        "mma: float32 columns swapped",
        "sum.value[n][j] += left[0] * right",
        "sum.value[n][1 - j] += left[0] * right",
    ),
    _masks(
        "masks: missing barrier",
        "            GVIT_SYNC();\n            for (index_t x = larger",
        "            for (index_t x = larger",
    ),
    _masks(
        "masks: weights exchanged",
        "return low_weight * low + high_weight * high;",
        "return high_weight * low + low_weight * high;",
    ),
    _masks("masks: last of equals wins", "return (value > best) |", "return (value >= best) |"),
    _masks("masks: background is not shifted", "best.index + 1 : 0", "best.index : 0"),
]


def mutated(mutation: Mutation, folder: Path) -> None:
    """Copy the sources into `folder` with the mutation made.

    Raises:
        ValueError: the text to replace is not there exactly once.
    """
    for part in ("kernels", "csrc"):
        shutil.copytree(ROOT / part, folder / part)
    path = folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.file}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))


PYTEST_OPTIONS = ["-x", "-q", "-ra", "--no-header", "--tb=line", "-p", "no:cacheprovider"]


def failed_test(tests: str, root: str) -> str | None:
    """pytest's line for the first of these tests that fails on the sources under `root`, or None."""
    command = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS, tests]
    command += ["-k", "host_cuda"] if tests.startswith(OPERATORS) else []
    environment = os.environ | {ROOT_VARIABLE: root, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    if run.returncode != 1:
        raise RuntimeError(f"{tests} did not run\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
    return next(line for line in run.stdout.splitlines() if line.startswith(("FAILED ", "ERROR ")))


def caught_by(mutation: Mutation) -> str | None:
    """The test that failed and how, or None when every test passed."""
    with tempfile.TemporaryDirectory() as folder:
        mutated(mutation, Path(folder))
        return next(filter(None, (failed_test(tests, folder) for tests in mutation.tests)), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.words or any(word in m.name for word in options.words)]
    survivors = []
    for number, mutation in enumerate(chosen, start=1):
        if options.list:
            print(mutation.name)
            continue
        start = time.monotonic()
        reason = caught_by(mutation)
        if reason is None:
            survivors.append(mutation.name)
        seconds = time.monotonic() - start
        print(
            f"[{number}/{len(chosen)}] {mutation.name}: {reason or 'NOT NOTICED'} ({seconds:.0f} s)",
            flush=True,
        )
    if survivors:
        sys.exit(f"{len(survivors)} of {len(chosen)} mutations were not noticed: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
