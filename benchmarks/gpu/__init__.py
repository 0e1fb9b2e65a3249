"""What benchmarks/gpu_check.py and its neighbours gpu_*.py do; they need torch alone, and Triton.

machine.py    where it runs: a GPU, or the CPU in a rehearsal
sections.py   sections with budgets, each of which catches its own failure
calls.py      a layer's steps, ours and torch's, as calls without arguments
compiling.py  all kernels compiled ahead, in several processes
correct.py    the steps against float64, and the same bits in every run
networks.py   a small network and its training step; training.py, that over ranks with DDP
waits.py      no step waits for the device; CUDA graphs replay what eager does
peer.py       the second of two ranks, in this one
tools.py      the project's tests of the kernels; compute-sanitizer
fusion.py     what torch.compile makes for a GPU that is not here, counted
speed.py      times on the device and on the host, compiled blocks
"""
