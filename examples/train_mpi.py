"""Training with synchronised statistics under MPI alone, without torch.distributed.

mpiexec -n 2 python -m mpi4py examples/train_mpi.py
"""

import torch
from torch import nn

import syncbn


def main() -> None:
    comm = syncbn.comm.MPI()
    torch.manual_seed(0)  # the same initial weights everywhere
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    model = syncbn.convert(model, comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    torch.manual_seed(1 + comm.rank)  # other images everywhere, one per rank
    for _ in range(10):
        images, labels = torch.randn(1, 3, 32, 32), torch.randint(10, (1,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        mean = comm.all_reduce(nn.utils.parameters_to_vector(gradients)) / comm.size
        nn.utils.vector_to_parameters(mean, gradients)  # what DistributedDataParallel would do
        optimizer.step()

    everywhere = comm.all_gather(model[1].running_var)
    if comm.rank == 0:
        equal = all(torch.equal(model[1].running_var, other) for other in everywhere)
        print(f"running_var equal on all {comm.size} ranks: {equal}")


if __name__ == "__main__":
    main()
