"""`plan`: does a run fit its GPUs, and how fast will it be."""

import argparse
import json
import sys

from dist_transformer.cli.parsing import Commands, add_command, positive
from dist_transformer.errors import ConfigError


def add_plan(commands: Commands) -> None:
    """The command of this module."""
    parser = add_command(
        commands,
        "plan",
        "say whether a run fits its GPUs, how fast it will be, and which layouts are faster; needs no GPU",
        "dist-transformer plan configs/pretrain_t5_base.yaml --nodes 2 --gpus-per-node 8 --gpu h100 --search",
        _plan,
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of each (default: 8)"
    )
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="such as h100, h200, a100, a100-40, l40s (default: h100)",
    )
    parser.add_argument(
        "--memory-gib", type=_positive, metavar="X", help="what one GPU has, if not as its data sheet says"
    )
    parser.add_argument(
        "--network", type=_positive, default=50.0, metavar="GB/S",
        help="each GPU's share of its node's network, in one direction (default: 50, of 400 Gbit/s)",
    )  # fmt: skip
    parser.add_argument(
        "--efficiency", type=_share, default=0.7, metavar="SHARE",
        help="of the peak FLOP/s, what matrix products reach (default: 0.7)",
    )  # fmt: skip
    parser.add_argument(
        "--reserve-gib", type=_not_negative, metavar="X",
        help="for CUDA, NCCL and fragmentation (default: 1.5 and 5 %% of the activations)",
    )  # fmt: skip
    parser.add_argument(
        "--search", action="store_true", help="list the fastest layouts that fit; takes a minute or two"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead, in bytes and seconds"
    )


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from dist_transformer.config import load_config

    config = load_config(options.config, options.overrides)
    from dist_transformer.plan.devices import Rates, find_gpu
    from dist_transformer.plan.planner import GIB, Planner, known_vocabulary
    from dist_transformer.plan.report import as_json, describe, table
    from dist_transformer.plan.search import check_batch, search
    from dist_transformer.plan.speed import Cluster

    gpu = find_gpu(options.gpu)
    if options.memory_gib is not None:
        gpu = replace(gpu, memory_gib=options.memory_gib)
    config, source = known_vocabulary(config)
    cluster = Cluster(options.nodes, options.gpus_per_node, gpu, 1e9 * options.network)
    reserved = None if options.reserve_gib is None else options.reserve_gib * GIB
    planner = Planner(cluster, Rates(products=options.efficiency), reserved)
    if options.search:
        check_batch(planner, config)
    plan, problem = None, ""
    try:
        plan = planner.plan(config)
    except ConfigError as error:  # A search may find what goes.
        if not options.search:
            raise
        problem = str(error)
    best = search(planner, config, say=_say) if options.search else []
    if options.search and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if options.json:
        found = {"problem": problem} if plan is None else as_json(plan)
        found |= {"vocab_size": config.model.vocab_size, "vocab_size_from": source}
        print(json.dumps(found | ({"best": [as_json(one) for one in best]} if options.search else {})))
        return
    print(f"vocabulary of {config.model.vocab_size:,} tokens ({source})")
    print(problem if plan is None else "\n".join(describe(plan)))
    if best:
        print("\nthe fastest layouts that fit:", *table(best, config), sep="\n")
    elif options.search:
        hint = "; try parallel.offload=optimizer" if config.parallel.offload == "none" else ""
        print(f"\nno layout of this model fits these GPUs{hint}")


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what[:100]}", end="", file=sys.stderr, flush=True)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share, such as 0.7")
    return value
