"""An interpreter of PTX, the instructions that Triton and nvcc compile kernels to, and the kernels in it.

It says whether the compiled instructions compute what they should, and it finds races, missing barriers and fences,
accesses out of bounds, and memory or registers that nobody wrote. It cannot show

- machine code: the driver's compiler may merge, split or reorder instructions;
- other inputs and grids than those that run: a race is seen where two accesses meet;
- a GPU's rounding of ``ex2``, approximate divisions and tensor cores, which are more exact here;
- time.

``parser`` reads the text, ``instructions`` has the table of all that is interpreted, ``lanes`` the state of the blocks
that run together, ``operands`` how they are read and written, ``memory`` the bytes and who touched them, ``machine``
the loop. An unknown instruction or modifier
is refused by its name. TMA, mbarriers, clusters, local memory and calls of functions are not interpreted.
"""
