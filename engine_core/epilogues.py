"""What follows a linear in a decoder layer becomes part of its kernel: the graph is rewritten before inductor sees it.

    gate/up ─▶ split ─▶ SiLU, times     the gated linear of an MLP
    down    ─▶ plus what came in        the sum that leaves the layer

Both would be kernels of their own, since inductor does not look into `minivllm::linear`. Only what is found in exactly
this form is rewritten; everything else stays as it is.
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._inductor import compile as compile_graph
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import silu

from engine_core.triton_linear import LINEAR

_SUMS = (operator.add, operator.iadd)


def compile_fused(module: GraphModule, inputs: Sequence[Any]) -> Any:
    """A backend of `torch.compile`: `fuse_epilogues`, then inductor."""
    fuse_epilogues(module.graph)
    module.recompile()
    return compile_graph(module, list(inputs))


def fuse_epilogues(graph: Graph) -> int:
    """Returns how many linears took over what follows them."""
    return sum(_fuse_gate(graph, node) or _fuse_sum(graph, node) for node in list(graph.nodes))


def _fuse_gate(graph: Graph, product: Any) -> bool:
    """SiLU(y[..., :n]) * y[..., n:] of a linear y."""
    match product:
        case Node(
            target=operator.mul,
            args=(
                Node(target=activation, args=(Node(target=operator.getitem, args=(split, 0)) as gate,)) as active,
                Node(target=operator.getitem, args=(same_split, 1)) as up,
            ),
        ) if activation is silu and same_split is split:
            pass
        case _:
            return False
    match split:
        case Node(target="split", args=(Node(args=(x, weight, bias, arrivals)) as linear, [size, same_size], -1)):
            chain = (active, gate, up, split, linear)
        case _:
            return False
    num_users = [len(node.users) for node in chain]
    if linear.target is not LINEAR or same_size != size or num_users != [1, 1, 1, 2, 1]:
        return False
    _replace(graph, product, (x, weight, bias, arrivals, None, True), chain)
    return True


def _fuse_sum(graph: Graph, total: Any) -> bool:
    """A linear and what is added to it, where the sum leaves the graph: inside it, inductor joins it with a norm."""
    if total.target not in _SUMS or any(user.op != "output" for user in total.users):
        return False
    orders = [total.args, total.args[::-1]]
    if total.target is operator.iadd:  # changes the first, too: fine where that is the linear's
        orders.pop()
    for linear, addend in orders:
        match linear:
            case Node(args=(_, _, _, _)) if linear.target is LINEAR and len(linear.users) == 1:
                if _are_alike(linear, addend):
                    _replace(graph, total, (*linear.args, addend), (linear,))
                    return True
    return False


def _are_alike(*nodes: Any) -> bool:
    """Whether both are tensors of the same shape and type, for any number of tokens."""
    match [node.meta.get("example_value") if isinstance(node, Node) else None for node in nodes]:
        case [Tensor() as one, Tensor() as other] if one.dtype == other.dtype and one.ndim == other.ndim:
            return all(statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True))
    return False


def _replace(graph: Graph, node: Node, arguments: tuple[Any, ...], chain: Sequence[Node]) -> None:
    """A linear with `arguments` takes the place of `node` and of `chain`, what led to it, from behind."""
    with graph.inserting_before(node):
        fused = graph.call_function(LINEAR, arguments)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    for each in (node, *chain):
        graph.erase_node(each)
