"""Training speed compared with TRL: same rows, masks, starting weights and global batch, in turns, the peer at its best.

    python benchmarks/train_speed.py --json benchmarks/results/train_speed.json      # three hours on two cores

The peer's settings are searched, not chosen: (bfloat16, float32) x (micro-batches of 1, 2, 4, 8, 16 rows, the rows of a step
sorted by length) x (TRL padded, TRL padding-free, transformers' Trainer with torch's loss), one step of each. The search over
sizes stops at the first that is 1.25 x as slow. The fastest settings continue in their own processes, with the same allocator
settings as ours. Each side holds its model and waits; the sides alternate optimizer steps (A B A B ...). The result is the
median of the ratios of consecutive turns. The seconds of every turn are kept.

Two ratios are claimed: each side in its fastest dtype, and both in float32. `trl_defaults` is TRL with its defaults.
LLaMA-Factory trains in an environment of its own (llamafactory_env.py). `--only PART` runs one part and leaves the other
results in the file unchanged.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import claim, merged, parser, report
from sides import Side, until_slower

import tunesmith
from tunesmith.demo import write_input
from tunesmith.engine.modeling.gemm import linear
from tunesmith.hardware import detect
from tunesmith.models import builtin
from tunesmith.models.builtin import NAME
from tunesmith.models.catalogue import find_config
from tunesmith.models.families import read_architecture
from tunesmith.models.load import load_model, load_tokenizer
from tunesmith.recipe import ResolvedRecipe, load_recipe, parse_recipe

ALPACA = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_demo" / "alpaca_en_demo.json"

ROWS = 16  # per optimizer step
MICRO = 8  # rows per micro-batch of TRL with its defaults
SIZES = (1, 2, 4, 8, 16)  # rows per micro-batch to try
DTYPES = ("bfloat16", "float32")
FINALISTS = 2  # per dtype, measured in turns with ours
TURNS = 3
FLOOR_TURNS = 12  # the machine's speed changes from turn to turn
PARITY_STEPS = 50
R = 16

#: The sides of train_side.py whose best settings are searched.
PEERS = ("trl_padded", "trl_padding_free", "transformers")

Row = dict[str, Any]
Claims = list[dict[str, Any]]


@contextmanager
def processes(
    names: Sequence[str],
    data: Path,
    method: str,
    *,
    rows: int,
    micro: int,
    dtype: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[Side]]:
    """Sides that have loaded the model and wait; `environment` is added to theirs."""
    arguments = ["--data", str(data), "--method", method, "--rows", str(rows), "--micro", str(micro), "--r", str(R)]
    with ExitStack() as stack:
        made = []
        for name in names:
            made.append(side_of(name, [*arguments, "--dtype", dtype, "--scratch", str(data)], environment))
            stack.callback(made[-1].end)
            made[-1].read()  # waits until it is ready
        yield made


def side_of(name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Side:
    """The process of a side; LLaMA-Factory runs in its own environment."""
    if name != "llamafactory":
        return Side(name, "train_side.py", arguments, environment=environment)
    from llamafactory_env import ensure, paths

    model = Path(arguments[arguments.index("--scratch") + 1]) / "model-float32"
    if not model.is_dir():  # it uses the dtype of the saved weights
        load_model(builtin.ensure(), dtype="float32").save_pretrained(model)
        load_tokenizer(builtin.ensure()).save_pretrained(model)
    return Side(name, "llamafactory_side.py", ["--model", str(model), *arguments], python=ensure(), environment=paths())


def prepared(name: str, folder: Path) -> Path:
    """The `data/` folder with the rows of the demo or of alpaca_demo (English); no held-out rows."""
    overrides = ["data.heldout=0", "data.on_bad_row=reject"]
    resolved: ResolvedRecipe
    if name == "demo":
        resolved = load_recipe(write_input(folder / "input"), [*overrides, "data.max_rows=null"])
    else:
        text = f"model: {NAME}\ndata: {{train: {json.dumps(str(ALPACA))}, max_length: 1024}}\n"
        resolved = parse_recipe(text, "the benchmark", folder, overrides)
    run = tunesmith.create_run(resolved, folder / name)
    tunesmith.prepare(run)
    return run.path / "data"


@dataclass(frozen=True)
class Peer:
    """A peer's settings, and the seconds of one step in the search."""

    side: str
    dtype: str
    micro: int
    seconds: float


seconds_of = operator.attrgetter("seconds")


def screened(data: Path, name: str, method: str) -> tuple[list[Peer], Row]:
    """Settings of the peers, fastest first, by one step each. Settings that a peer refuses are skipped and recorded."""
    found, failed = list[Peer](), list[str]()
    for side, dtype in itertools.product(PEERS, DTYPES):
        arguments = ["--data", str(data), "--method", method, "--rows", str(ROWS), "--micro", "1", "--r", str(R)]
        arguments += ["--dtype", dtype, "--scratch", str(data), "--screen", *map(str, SIZES)]
        process = Side(side, "train_side.py", arguments)
        try:
            process.read()
            answers = (process.read() for _ in SIZES)
            found += until_slower((Peer(side, dtype, made["micro"], made["seconds"]) for made in answers), seconds_of)
        except RuntimeError as error:
            failed.append(f"{side} in {dtype}: {error}")
        finally:
            process.end()
    found.sort(key=lambda each: each.seconds)
    return found, {"part": f"{name}-{method}-screened", "settings": [asdict(each) for each in found], "failed": failed}


def one_step(data: Path, peer: Peer) -> Peer:
    """The peer with the seconds of its first step; infinite if it refuses the setting."""
    try:
        with processes([peer.side], data, "lora", rows=ROWS, micro=peer.micro, dtype=peer.dtype) as (side,):
            return replace(peer, seconds=float(side.ask("1")["seconds"]))
    except RuntimeError as error:
        print(f"{peer}: {error}", flush=True)
        return replace(peer, seconds=math.inf)


def compared(data: Path, name: str, method: str, peer: Peer, ours: str, *, turns: int = TURNS) -> Row:
    """Every turn of both sides, and the median ratios: theirs over ours in time, ours over theirs in memory."""
    arguments = ["--data", str(data), "--method", method, "--rows", str(ROWS), "--r", str(R), "--scratch", str(data)]
    with ExitStack() as stack:
        sides = []
        for side, dtype, micro in (("tunesmith", ours, MICRO), (peer.side, peer.dtype, peer.micro)):
            sides.append(side_of(side, [*arguments, "--dtype", dtype, "--micro", str(micro)]))
            stack.callback(sides[-1].end)
            sides[-1].read()  # waits until it is ready
        row = in_turns(sides, turns)
    made = {"part": f"{name}-{method}", "peer": asdict(peer), "our_dtype": ours, "rows_a_step": ROWS, **row}
    print(json.dumps(made), flush=True)
    return made


def in_turns(sides: Sequence[Side], turns: int) -> Row:
    """What each side took, turn by turn; the ratios of the first side to each other side."""
    for side in sides:
        side.ask("1")  # the first step allocates
    taken: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            taken[side.name].append(side.ask("1"))
    ours = taken[sides[0].name]
    row: Row = {}
    for name, made in taken.items():
        row[name] = {
            "seconds": [turn["seconds"] for turn in made],
            "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in made),
            "losses": [loss for turn in made for loss in turn["losses"]],
        }
        if name != sides[0].name:
            row["time_ratios"] = [their["seconds"] / own["seconds"] for their, own in zip(made, ours, strict=True)]
            row["time_ratio"] = statistics.median(row["time_ratios"])
            row["memory_ratio"] = row[sides[0].name]["peak_memory_bytes"] / row[name]["peak_memory_bytes"]
            row["loss_difference"] = max(
                abs(own - their) for own, their in zip(row[sides[0].name]["losses"], row[name]["losses"], strict=True)
            )
    return row


def speed(name: str, method: str) -> Callable[[Path], tuple[Claims, list[Row]]]:
    """A part: our engine against the peer at its best, each in its fastest dtype, and both in float32."""

    def part(folder: Path) -> tuple[Claims, list[Row]]:
        data = prepared(name, folder)
        peers, row = screened(data, name, method)
        rows = [row]
        claims: Claims = []
        for suffix, allowed, ours in (("", DTYPES, detect().compute_dtype), ("_float32", ("float32",), "float32")):
            finalists = [peer for peer in peers if peer.dtype in allowed][:FINALISTS]
            made = [compared(data, name, method, peer, ours) for peer in finalists]
            best = min(made, key=lambda each: each["time_ratio"])
            claims.append(claim(f"rows_per_second_ratio_{name}_{method}{suffix}", best["time_ratio"], "x"))
            claims.append(claim(f"peak_memory_ratio_{name}_{method}{suffix}", best["memory_ratio"], "x"))
            rows += made
        return claims, rows

    return part


def llamafactory(folder: Path) -> tuple[Claims, list[Row]]:
    """Rows per second against LLaMA-Factory for adapters on both sets, in its fastest dtype and micro-batch."""
    claims, rows = [], []
    for name in ("demo", "alpaca"):
        data = prepared(name, folder)
        found = list[Peer]()
        for dtype in DTYPES:
            tried = (one_step(data, Peer("llamafactory", dtype, micro, math.inf)) for micro in SIZES)
            found += until_slower(tried, seconds_of)
        found = sorted((peer for peer in found if peer.seconds < math.inf), key=lambda peer: peer.seconds)
        made = [compared(data, name, "lora", peer, detect().compute_dtype) for peer in found[:FINALISTS]]
        best = min(made, key=lambda each: each["time_ratio"])
        claims.append(claim(f"rows_per_second_ratio_to_llamafactory_{name}_lora", best["time_ratio"], "x"))
        claims.append(claim(f"peak_memory_ratio_to_llamafactory_{name}_lora", best["memory_ratio"], "x"))
        rows += [{**row, "part": f"llamafactory-{name}"} for row in made]
    return claims, rows


def defaults(folder: Path) -> tuple[Claims, list[Row]]:
    """Both sides with their defaults, each in the dtype that it chooses."""
    dtype = detect().compute_dtype
    row = compared(prepared("demo", folder), "defaults", "lora", Peer("trl_defaults", dtype, MICRO, math.nan), dtype)
    time_ratio = claim("rows_per_second_ratio_to_trl_defaults", row["time_ratio"], "x")
    return [time_ratio, claim("peak_memory_ratio_to_trl_defaults", row["memory_ratio"], "x")], [row]


def matrix_rate(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = linear) -> float:
    """FLOP/s of float32 GEMMs in the model's own shapes, 2,048 tokens: the median, shapes weighted by their share of the FLOPs.

    By oneDNN, which the engine uses; on an AMD processor it is up to twice as fast as MKL, which torch's own operators use.
    """
    shapes = {(576, 1536): 2, (1536, 576): 1, (576, 576): 2, (576, 192): 2}
    seconds, flops = 0.0, 0
    for (into, out), times in shapes.items():
        x, weight = torch.randn(2048, into), torch.randn(out, into)
        took = []
        for _ in range(15):
            begun = time.perf_counter()
            product(x, weight)
            took.append(time.perf_counter() - begun)
        seconds += times * statistics.median(took[3:])
        flops += times * 2 * 2048 * into * out
    return flops / seconds


def floor(method: str) -> Callable[[Path], tuple[Claims, list[Row]]]:
    """A part: the share of the FLOP floor that the engine reaches, with the machine's rate measured before and after each turn.

    Claimed for the rate of the faster library, and for that of torch's own operators, which no engine built on them can exceed.

    Floor: 4 N (adapters) or 6 N (full) per computed token, N weights of linear layers, and 4 h V or 6 h V per labelled
    token; it excludes attention, norms, adapters and the optimizer.
    """

    def part(folder: Path) -> tuple[Claims, list[Row]]:
        data = prepared("alpaca", folder)
        architecture = read_architecture(find_config(NAME)[0])
        weights = architecture.linear_weights
        head = architecture.hidden_size * architecture.vocab_size
        each = 6 if method == "full" else 4
        shares, rates, of_torch = [], [], []
        with processes(["tunesmith"], data, method, rows=ROWS, micro=MICRO, dtype="float32") as (side,):
            side.ask("1")
            for _ in range(FLOOR_TURNS):
                before = matrix_rate()
                turn = side.ask("1")
                rates.append((before + matrix_rate()) / 2)
                flops = each * (weights * turn["computed_tokens"] + head * turn["labelled_tokens"])
                shares.append(flops / rates[-1] / turn["seconds"])
                of_torch.append(flops / matrix_rate(F.linear) / turn["seconds"])
        row = {"part": f"floor-{method}", "shares": shares, "matrix_flops_per_second": rates, "shares_of_torch": of_torch}
        print(json.dumps(row), flush=True)
        name = f"flop_floor_fraction_{method}"
        return [claim(name, statistics.median(shares), ""), claim(f"{name}_at_torch_rate", statistics.median(of_torch), "")], [
            row
        ]

    return part


def parity(folder: Path) -> tuple[Claims, list[Row]]:
    """Losses compared with TRL over 50 steps from the same weights, for each method; few rows per step to keep it short."""
    rows = []
    for method in ("full", "lora"):
        data = prepared("demo", folder / method)
        with processes(["tunesmith", "trl_padded"], data, method, rows=2, micro=2, dtype="float32") as sides:
            ours, theirs = (side.ask(str(PARITY_STEPS)) for side in sides)
        losses = [abs(one - other) for one, other in zip(ours["losses"], theirs["losses"], strict=True)]
        norms = [abs(one / other - 1) for one, other in zip(ours["grad_norms"], theirs["grad_norms"], strict=True)]
        rows.append(
            {
                "part": "parity",
                "method": method,
                "steps": PARITY_STEPS,
                "loss_max_abs_diff": max(losses),
                "loss_mean_diff": statistics.fmean(a - b for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
                "grad_norm_max_rel_diff": max(norms),
                "losses": ours["losses"],
                "trl_losses": theirs["losses"],
            }
        )
        print({key: value for key, value in rows[-1].items() if "losses" not in key}, flush=True)
    return [claim("loss_max_abs_diff_to_trl", max(row["loss_max_abs_diff"] for row in rows), "nats")], rows


def gradients(_: Path) -> tuple[Claims, list[Row]]:
    """Largest relative difference between gradients of trees and of padded rows: float64, five architectures, random trees."""
    from gradient_parity import largest_difference

    rows = [{"part": "gradients", "architecture": name, "max_rel_diff": diff} for name, diff in largest_difference().items()]
    worst = max(row["max_rel_diff"] for row in rows)
    if not math.isfinite(worst):
        raise AssertionError("a gradient is not finite")
    return [claim("packed_gradient_max_rel_diff_fp64", worst, "")], rows


PARTS: Mapping[str, Callable[[Path], tuple[Claims, list[Row]]]] = {
    "gradients": gradients,
    "parity": parity,
    **{f"{name}-{method}": speed(name, method) for name in ("demo", "alpaca") for method in ("lora", "full", "qlora")},
    "floor-lora": floor("lora"),
    "floor-full": floor("full"),
    "defaults": defaults,
    "llamafactory": llamafactory,
}


def main() -> None:
    """Run the parts and write the results after each."""
    options = parser(__doc__ or "")
    options.add_argument("--only", choices=list(PARTS), action="append")
    asked = options.parse_args()
    for name in asked.only or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            claims, rows = PARTS[name](Path(scratch))
        report(asked.json, *merged(asked.json, claims, rows))


if __name__ == "__main__":
    main()
