// Where a thread is (PTX ISA: Special Registers, %tid, %ntid, %ctaid, %nctaid). Blocks are one-dimensional.
#pragma once

#include "device.cuh"

namespace attn::ptx {

#ifdef ATTN_EMULATOR

inline int thread() { return emulator::here.thread; }
inline int threads() { return emulator::here.threads; }
inline int64_t block_x() { return emulator::here.block[0]; }
inline int64_t block_y() { return emulator::here.block[1]; }
inline int64_t block_z() { return emulator::here.block[2]; }
inline int64_t blocks_x() { return emulator::here.blocks[0]; }
inline int64_t blocks_y() { return emulator::here.blocks[1]; }
inline int64_t blocks_z() { return emulator::here.blocks[2]; }

#else

DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DEVICE int threads() { return static_cast<int>(blockDim.x); }
DEVICE int64_t block_x() { return blockIdx.x; }
DEVICE int64_t block_y() { return blockIdx.y; }
DEVICE int64_t block_z() { return blockIdx.z; }
DEVICE int64_t blocks_x() { return gridDim.x; }
DEVICE int64_t blocks_y() { return gridDim.y; }
DEVICE int64_t blocks_z() { return gridDim.z; }

#endif

DEVICE int lane() { return thread() % 32; }
DEVICE int warp() { return thread() / 32; }

}  // namespace attn::ptx
