"""Training steps of one version of lilliput, at the request of bench/overhead.py.

python bench/overhead_worker.py SRC NETWORK VARIANT    reads a count of steps a line, answers with processor seconds
"""

import sys
import time

import torch


def main() -> None:
    """Train with the lilliput in SRC and take as many steps as each line of stdin asks for."""
    source, network, variant = sys.argv[1:4]
    sys.path.insert(0, source)
    import lilliput
    from lilliput.nets.mnist1d import MLP
    from lilliput.nets.resnet import ResNet
    from lilliput.train import fit

    assert lilliput.__file__.startswith(source), f"{lilliput.__file__} is not in {source}"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, shape = (MLP(), (40,)) if network == "MLP" else (ResNet(), (1, 28, 28))
    x, y = torch.randn(640, *shape), torch.randint(0, 10, (640,))
    task = lilliput.Task("random", train=(x, y), val=(x[:64], y[:64]), batch_size=64)
    rules = {"gradual pruning": (lilliput.Prune(0.9),), "distillation": (lilliput.Distill(),)}.get(variant, ())
    start = lilliput.Prune(0.9)(model, task, None) if variant == "mask" else model
    left, began = int(sys.stdin.readline()), time.process_time()

    def stop(step: int) -> bool:
        nonlocal left, began
        left -= 1
        if left == 0:
            print(time.process_time() - began, flush=True)
            left, began = int(sys.stdin.readline() or 0), time.process_time()
        return left == 0

    fit(lilliput.Train(10**6, lr=1e-4, rules=rules), start, task, lilliput.Reference(model, task), stop=stop)


if __name__ == "__main__":
    main()
