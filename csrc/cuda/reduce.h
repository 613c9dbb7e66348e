// Reductions over the threads of a block, such as sums, always in the same order.
#pragma once

namespace irlfast {

// A Part has merged(a, b), and from_lane(mine, mask): the part of the thread whose lane differs by `mask`.
template <class Part>
__device__ __forceinline__ Part over_warp(Part mine) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) mine = merged(mine, from_lane(mine, mask));
  return mine;
}

// Every thread gets the result. A kernel calls this once: a second call could overwrite parts that are still unread.
template <class Part>
__device__ __forceinline__ Part over_block(Part mine, Part nothing) {
  __shared__ Part of_warp[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  mine = over_warp(mine);
  if (lane == 0) of_warp[warp] = mine;
  __syncthreads();
  return over_warp(lane < blockDim.x / 32 ? of_warp[lane] : nothing);
}

}  // namespace irlfast
