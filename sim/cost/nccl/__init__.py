"""What NCCL does with a collective: rings and trees over this machine, the algorithm and protocol, the wires, the time.

Steps, each as in NCCL (version 2.30):

1. ``rings``: rings over the GPUs of a group, and how fast the search lets each channel run.
2. ``tuning``: latency and bandwidth of every algorithm and protocol by NCCL's own model; the smallest time wins.
   ``collnet`` adds what switches that reduce can do.
3. ``loads``: bytes on every link for all the groups together.
4. ``durations``: how long the kernels take on idle wires, by their own steps, chunks and channels (``terms``,
   measured); it enters as latency and cap of the phase.

``plan`` goes through them, for what one rank sends to another with the channels of ``messages``.
``tensor_bytes`` follows nccl-tests: an all-gather's output, a reduce-scatter's input, else the buffer.
"""
