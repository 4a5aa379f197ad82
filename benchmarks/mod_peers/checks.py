"""Correctness checks, written once against `peer.Peer`.

Every check returns a verdict and one short measured fact. The docstring of a check is its definition in the table.
"""

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peer import VOCAB, NotOfferedError, NotPossibleError, Peer, PeerError, Trace
from torch import Tensor


TOLERANCE = 1e-4
PROMPT = 16
SEQUENCES = 4

PASS, FAIL, NOT_OFFERED, NOT_POSSIBLE = "pass", "fail", "not offered", "not possible"


@dataclass
class Verdict:
    """Outcome of one check.

    Attributes:
        status: pass, fail, not offered, or not possible.
        fact: what was measured.
    """

    status: str
    fact: str


def sequence(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Rows of token ids without repetition within a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCAB - 1, generator=generator)[:length] + 1 for _ in range(batch)])


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite if a value is not finite."""
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def verdict(ok: bool, fact: str) -> Verdict:
    return Verdict(PASS if ok else FAIL, fact)


def same(a: Tensor, b: Tensor, what: str) -> Verdict:
    """Pass where two outputs agree."""
    gap = difference(a, b)
    return verdict(gap <= TOLERANCE, f"{what} differ by {gap:.2g} of the largest")


def exact_count(peer: Peer) -> Verdict:
    """Exactly C of S tokens enter each routed layer at capacity C/S, also when all router outputs are equal."""
    peer.build(capacity=0.125)
    wanted = peer.capacity_of(0.125, peer.seq)
    counts = [len(trace.selected) for seed in range(3) for trace in peer.traces(sequence(peer.seq, seed))]
    with peer.forced_router(0.5):
        tied = [len(trace.selected) for trace in peer.traces(sequence(peer.seq))]
    fact = (
        f"{span(counts)} of {peer.seq} tokens selected where {wanted} were asked for, {span(tied)} with equal scores"
    )
    return verdict(set(counts) == {wanted} and set(tied) == {wanted}, fact)


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def traces_with_routed(peer: Peer) -> list[Trace]:
    """Traces of a few sequences through the layers that took some of their tokens."""
    traces = [
        trace for seed in range(SEQUENCES) for trace in peer.traces(sequence(peer.seq, seed)) if len(trace.selected)
    ]
    if not traces:
        raise NotPossibleError(f"no layer took any token of {SEQUENCES} sequences")
    return traces


def residual_kept(peer: Peer) -> Verdict:
    """With the projections through which a routed block writes set to zero, its tokens leave as they came in."""
    peer.build(capacity=0.5)
    peer.silence()
    ratios, gaps, moved, zeros, total = [], [], 0, 0, 0
    for trace in traces_with_routed(peer):
        x, y = trace.x[trace.selected], trace.y[trace.selected]
        ratios.append(float((y.norm(dim=-1) / x.norm(dim=-1)).mean()))
        gaps.append(difference(y, x))
        total += len(x)
        zeros += int((y == 0).all(-1).sum())
        nearest = torch.cdist(x, trace.y).argmin(dim=1)
        found = (trace.y[nearest] - x).abs().amax(-1) <= TOLERANCE * x.abs().max()
        moved += int((found & (nearest != trace.selected)).sum())
    fact = f"a routed token's norm is {min(ratios):.2f} to {max(ratios):.2f} of the input's (mean per layer)"
    fact += f"; {moved} of {total} leave at the place of another token" if moved else ""
    fact += f"; {zeros} of {total} leave as zeros" if zeros else ""
    return verdict(max(gaps) <= TOLERANCE, fact)


def equation_one(peer: Peer) -> Verdict:
    """A routed token becomes x + g (block(x) - x), with g its router's output r or a function of it (sigmoid, 0/1)."""
    peer.build(capacity=0.5)
    names: set[str] = set()
    misfit = 0.0
    for trace in traces_with_routed(peer):
        x, y, router = trace.x[trace.selected], trace.y[trace.selected], trace.router[trace.selected]
        update = trace.block - x
        others = torch.ones(len(trace.x), dtype=torch.bool).index_fill(0, trace.selected, False)
        misfit = max(misfit, difference(trace.y[others], trace.x[others]) if others.any() else 0.0)
        gates = {"r": router, "sigmoid(r)": router.sigmoid(), "1": torch.ones_like(router)}
        gaps = {name: difference(y, x + gate[:, None] * update) for name, gate in gates.items()}
        best = min(gaps, key=lambda name: gaps[name])
        names.add(best)
        misfit = max(misfit, gaps[best])
    if misfit <= TOLERANCE:
        return Verdict(PASS, f"g = {', '.join(sorted(names))}")
    return Verdict(FAIL, f"differs by {misfit:.2g} of the largest output from the closest of g = r, sigmoid(r), 1")


def identity(peer: Peer) -> Verdict:
    """With every token routed and the gate at one, the outputs are those of the dense model with the same weights."""
    peer.build(capacity=1.0)
    ids = sequence(peer.seq)
    value = peer.force_value()
    with peer.forced_router(value):
        got = peer.routing_outputs(ids)
    want = peer.dense(ids)
    agree = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    result = same(got, want, "outputs")
    return Verdict(result.status, f"{result.fact}; the arg-max is the dense one at {agree:.0%} of positions")


def causal(peer: Peer) -> Verdict:
    """Editing later tokens leaves the earlier outputs alone, in the mode used for generation."""
    peer.build(capacity=0.25)
    cut = peer.seq * 3 // 4
    worst = 0
    for first in range(SEQUENCES):
        ids = sequence(peer.seq, first)
        before = peer.outputs(ids)
        for seed in range(SEQUENCES, 2 * SEQUENCES):
            edited = torch.cat([ids[:, :cut], sequence(peer.seq, seed)[:, cut:]], dim=1)
            gap = (peer.outputs(edited) - before)[:, :cut].abs().amax(-1)
            worst = max(worst, int((gap > TOLERANCE * before.abs().max()).sum()))
    edits = SEQUENCES * SEQUENCES
    return verdict(
        worst == 0, f"up to {worst} of {cut} earlier outputs change in {edits} edits of the last {peer.seq - cut}"
    )


def cached_equals_full(peer: Peer) -> Verdict:
    """A prompt and then one token at a time with the cache gives the outputs of one full forward."""
    peer.build(capacity=0.25)
    stepwise, full = [], []
    for seed in range(SEQUENCES):
        ids = sequence(2 * PROMPT, seed)
        peer.mode(routing=False)
        with torch.no_grad():
            stepwise.append(peer.cached(ids, PROMPT))
        full.append(peer.outputs(ids))
    result = same(torch.cat(stepwise), torch.cat(full), "outputs")
    gaps = [
        (a - b).abs().amax(-1)[0, PROMPT:] > TOLERANCE * b.abs().max() for a, b in zip(stepwise, full, strict=True)
    ]
    wrong = int(torch.cat(gaps).sum())
    return Verdict(result.status, f"{result.fact}, at {wrong} of {PROMPT * SEQUENCES} decoded positions")


def skipped_store_nothing(peer: Peer) -> Verdict:
    """Some tokens skip a routed layer while decoding, and those add no entry to that layer's keys and values."""
    peer.build(capacity=0.25)
    peer.mode(routing=False)
    with torch.no_grad():
        stores = [store for seed in range(SEQUENCES) for store in peer.store(sequence(2 * PROMPT, seed), PROMPT)]
    decoded, routed = sum(s.decoded for s in stores), sum(s.decoded_routed for s in stores)
    stored = sum(s.decoded_stored for s in stores)
    size, dense = sum(s.size for s in stores), sum(s.dense_size for s in stores)
    fact = (
        f"{routed} of {decoded} decoded tokens routed, {stored} stored; {size} bytes where dense layers keep {dense}"
    )
    exact = all(store.decoded_routed == store.decoded_stored for store in stores)
    return verdict(exact and 0 < routed < decoded and size < dense, fact)


def row_alone(peer: Peer) -> Verdict:
    """A row of a batch has the outputs that it has alone, in a full forward and (where offered) with the cache."""
    peer.build(capacity=0.25)
    ids = sequence(peer.seq, batch=6)
    result = same(peer.outputs(ids), torch.cat([peer.outputs(row[None]) for row in ids]), "outputs of a full forward")
    if result.status == FAIL:
        return result
    peer.mode(routing=False)
    short = ids[:, : 2 * PROMPT]
    try:
        with torch.no_grad():
            cached = same(
                peer.cached(short, PROMPT),
                torch.cat([peer.cached(row[None], PROMPT) for row in short]),
                "with the cache they",
            )
    except NotOfferedError:
        return result
    return Verdict(cached.status, f"{result.fact}; {cached.fact}")


def left_padding(peer: Peer) -> Verdict:
    """Pad tokens to the left, named by attention_mask, do not change the outputs of the others."""
    peer.build(capacity=0.25)
    padded, alone = [], []
    for seed, pads in ((0, 3), (1, 10), (2, 20), (3, 30)):
        ids = sequence(PROMPT * 2, seed)
        longer = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], dim=1)
        mask = (longer > 0).long()
        padded.append(peer.outputs(longer, mask)[:, pads:])
        alone.append(peer.outputs(ids, torch.ones_like(ids)))
    return same(torch.cat(padded), torch.cat(alone), "outputs")


def save_and_load(peer: Peer) -> Verdict:
    """Saved and loaded with the library's own means (a plain module: its state dict), the outputs are the same."""
    peer.build(capacity=0.25)
    ids = sequence(peer.seq)
    want = peer.routing_outputs(ids)
    with tempfile.TemporaryDirectory() as folder:
        again = peer.save_and_load(Path(folder))
        return same(again.routing_outputs(ids), want, "outputs")


def auto_model(peer: Peer) -> Verdict:
    """AutoModelForCausalLM (installed or trust_remote_code) loads what save_pretrained wrote, with the same logits."""
    peer.build(capacity=0.25)
    ids = sequence(peer.seq)
    peer.mode(routing=False)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        got = peer.auto_outputs(Path(folder), ids)
    return same(got, peer.outputs(ids), "outputs")


CHECKS: dict[str, Callable[[Peer], Verdict]] = {
    "Exact number selected": exact_count,
    "Residual kept": residual_kept,
    "Equation 1": equation_one,
    "Identity": identity,
    "Causal": causal,
    "Cached = full": cached_equals_full,
    "Skipped store nothing": skipped_store_nothing,
    "Row alone": row_alone,
    "Left padding": left_padding,
    "Save and load": save_and_load,
    "AutoModel": auto_model,
}


def run_all(peer: Peer, folders: list[str]) -> dict[str, Verdict]:
    """Every check on one implementation.

    An exception that went through a file in one of `folders` is the implementation's own: a fail, with its first line
    as the fact. Any other is the harness's, which measured nothing then.
    """
    results: dict[str, Verdict] = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            results[name] = check(peer)
        except NotOfferedError as error:
            results[name] = Verdict(NOT_OFFERED, str(error))
        except NotPossibleError as error:
            results[name] = Verdict(NOT_POSSIBLE, str(error))
        except PeerError as error:
            results[name] = Verdict(FAIL, str(error))
        except Exception as error:
            traceback.print_exc()
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            theirs = any(folder in file for folder in folders for file in files)
            first = (str(error).strip().splitlines() or [""])[0][:140]
            where = traceback.extract_tb(error.__traceback__)[-1].name
            status = FAIL if theirs else NOT_POSSIBLE
            results[name] = Verdict(
                status, f"raises {type(error).__name__} in {where}" + (f": {first}" if first else "")
            )
    return results
