"""Scores and sums of as many positions of a block as a vector has numbers, for compiled code, in LLVM IR.

    scores   one sum for each position stays in registers while the head dimension goes by; in the end they are
             transposed, so that adding vectors adds up the numbers of each: log2(POSITIONS) steps for all of them
    values   a part of the output stays in registers while the positions go by

Position p of them begins `stride` numbers after position p - 1. Blocks lie anywhere, and no core foresees which is read
next: while these positions go by, those at `ahead` are asked for, a cache line for each that is read.
"""

from typing import Any

from llvmlite import ir
from numba.core import types

from engine_core.cpu_jit import intrinsic
from engine_core.cpu_vectors import WIDTH, Int, Vector, VectorEmitter

POSITIONS = WIDTH
_MOST_PARTS = 4  # of the output at once


class _Emitter(VectorEmitter):
    """Writes loops over the numbers of a head."""

    def total_of_each(self, vectors: list[Any]) -> Any:
        """A vector of the totals of POSITIONS vectors, in their order."""
        unit = 1
        while len(vectors) > 1:
            ahead = [lane for lane in range(POSITIONS) if lane // unit % 2 == 0]  # … of pairs of units
            pairs = [ahead[i : i + unit] for i in range(0, len(ahead), unit)]
            first = [lane + side for pair in pairs for side in (0, POSITIONS) for lane in pair]
            second = [lane + unit for lane in first]
            vectors = [
                self.builder.fadd(self.shuffle(one, other, first), self.shuffle(one, other, second))
                for one, other in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            unit *= 2
        return vectors[0]


def _write_scores(_: Any, query: Any, keys: Any, start: Any, stride: Any, scores: Any, at: Any, ahead: Any) -> Any:
    """`score_positions(query, keys, start, stride, scores, at, ahead)`: scores[at …] = query [head_dim] · the keys.

    keys, scores: contiguous arrays; start, at, ahead: indices into them, as if they had one dimension; `ahead` may be
    None. head_dim: a multiple of POSITIONS.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, scores = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 4))
        emitter, zero = _Emitter(builder), ir.Constant(Vector, None)
        first_key, head_dim = emitter.at(keys.data, arguments[2]), builder.extract_value(query.shape, 0)
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        d = builder.phi(Int)
        totals = [builder.phi(Vector) for _ in range(POSITIONS)]
        part = emitter.load(emitter.at(query.data, d))
        for position, total in enumerate(totals):
            offset = builder.add(builder.mul(arguments[3], Int(position)), d)
            if ahead != types.none:
                emitter.prefetch(emitter.at(keys.data, arguments[6], offset), locality=2)
            total.add_incoming(zero, before)
            total.add_incoming(emitter.multiply_add(part, emitter.load(emitter.at(first_key, offset)), total), loop)
        following = builder.add(d, Int(POSITIONS))
        d.add_incoming(Int(0), before)
        d.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, head_dim), loop, after)
        builder.position_at_end(after)
        sums = emitter.total_of_each([total.incomings[1][0] for total in totals])
        emitter.store(sums, emitter.at(scores.data, arguments[5]))
        return context.get_dummy_value()

    return types.void(query, keys, types.int64, types.int64, scores, types.int64, ahead), emit


def _write_values(_: Any, weights: Any, at: Any, values: Any, start: Any, stride: Any, output: Any, ahead: Any) -> Any:
    """`add_positions(weights, at, values, start, stride, output, ahead)`, arguments as those of `score_positions`:

    output [head_dim] += weights[at …] · the values.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, output = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2, 5)
        )
        emitter = _Emitter(builder)
        first_weight, first_value = emitter.at(weights.data, arguments[1]), emitter.at(values.data, arguments[3])
        head_dim = builder.extract_value(output.shape, 0)
        d: Any = Int(0)
        for num_parts in (_MOST_PARTS, 1):
            width = Int(num_parts * POSITIONS)
            before, test, body, after = builder.block, *(builder.append_basic_block() for _ in range(3))
            builder.branch(test)
            builder.position_at_end(test)
            now = builder.phi(Int)
            following = builder.add(now, width)
            builder.cbranch(builder.icmp_signed("<=", following, head_dim), body, after)
            builder.position_at_end(body)
            targets = [emitter.at(output.data, now, Int(part * POSITIONS)) for part in range(num_parts)]
            totals = [emitter.load(target) for target in targets]
            for position in range(POSITIONS):
                weight = emitter.broadcast(builder.load(emitter.at(first_weight, Int(position)), align=4))
                offset = builder.add(builder.mul(arguments[4], Int(position)), now)
                for part, total in enumerate(totals):
                    place = offset, Int(part * POSITIONS)
                    if ahead != types.none:
                        emitter.prefetch(emitter.at(values.data, arguments[6], *place), locality=2)
                    value = emitter.load(emitter.at(first_value, *place))
                    totals[part] = emitter.multiply_add(weight, value, total)
            for total, target in zip(totals, targets, strict=True):
                emitter.store(total, target)
            builder.branch(test)
            now.add_incoming(d, before)
            now.add_incoming(following, body)
            builder.position_at_end(after)
            d = now
        return context.get_dummy_value()

    return types.void(weights, types.int64, values, types.int64, types.int64, output, ahead), emit


score_positions, add_positions = intrinsic(_write_scores), intrinsic(_write_values)
