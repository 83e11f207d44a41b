//! Mixed chunk attention of FLASH.

use attn_kernels::gau::{GlobalNorm, MixedChunkOptions};
use attn_kernels::problem::DType;

use super::{Case, Extra, Operation, in_all_layouts, in_whole_vectors};

pub fn mixed_chunk() -> Vec<Case> {
    use GlobalNorm::*;
    let case = |why, options: MixedChunkOptions<Extra>| Case::new(why, Operation::MixedChunk(options)).heads(1, 1, 1);
    let full = |chunk_size, global_norm| MixedChunkOptions { chunk_size, global_norm, ..Default::default() };
    let causal = |chunk_size, norm| MixedChunkOptions { causal: true, ..full(chunk_size, norm) };
    let biased = |options, bias| MixedChunkOptions { bias: Some(bias), ..options };
    let masked = |options, key_mask| MixedChunkOptions { key_mask: Some(key_mask), ..options };
    let scaled = |options, scale| MixedChunkOptions { scale: Some(scale), ..options };
    let cases = in_all_layouts(vec![
        case("no token", causal(64, Mean)).lengths(0, 0),
        case("no token, full", full(64, Length)).lengths(0, 0),
        case("no key", full(64, Mean)).lengths(5, 0),
        case("one token", causal(256, Mean)).lengths(1, 1),
        case("one token, full", full(256, Chunk)).lengths(1, 1).batch(3),
        case("less than a chunk", causal(64, Mean)).lengths(63, 63).batch(2),
        case("one chunk", causal(64, Chunk)).lengths(64, 64),
        case("a chunk and one", causal(64, Mean)).lengths(65, 65),
        case("ragged last chunk", causal(64, Mean)).lengths(200, 200).batch(2),
        case("the paper's chunk", causal(256, Mean)).lengths(1000, 1000).widths(8, 12),
        case("the paper's chunk, full", full(256, Mean)).lengths(1000, 1000).widths(8, 8),
        case("norm 1/C", causal(50, Chunk)).lengths(200, 200),
        case("norm 1/n", causal(50, Length)).lengths(200, 200).heads(2, 2, 2),
        case("full, norm 1/C", full(50, Chunk)).lengths(200, 200),
        case("full, norm 1/n", full(50, Length)).lengths(130, 130).heads(2, 2, 2),
        case("chunks of one", causal(1, Mean)).lengths(66, 66),
        case("chunks of 7, smaller than a tile", causal(7, Mean)).lengths(130, 130).batch(2),
        case("chunks of 100, larger than a tile", causal(100, Mean)).lengths(430, 430),
        case("chunk larger than the sequence", causal(4096, Length)).lengths(130, 130),
        case("chunk of any size", scaled(causal(usize::MAX, Mean), 0.1)).lengths(130, 130),
        case("many chunks in segments", causal(48, Mean)).lengths(1500, 1500).widths(4, 6),
        case("width 1", causal(16, Mean)).widths(1, 1),
        case("width 3", full(16, Mean)).widths(3, 3),
        case("widths 40 and 59", causal(32, Mean)).widths(40, 59).lengths(100, 100),
        case("widths 111 and 40", full(32, Mean)).widths(111, 40).lengths(100, 100),
        case("widest head", causal(32, Mean)).widths(509, 64).lengths(70, 70),
        case("widest values", causal(32, Mean)).widths(125, 2048).lengths(70, 70).only(&[DType::F32, DType::BF16]),
        case("full, more keys than queries", full(32, Mean)).lengths(70, 150),
        case("full, more queries than keys", full(32, Length)).lengths(150, 70),
        case("several heads", causal(64, Mean)).heads(4, 4, 4).lengths(130, 130),
        case("grouped heads", causal(64, Mean)).heads(4, 2, 2).lengths(130, 130).batch(2),
        case("grouped heads, full", full(64, Chunk)).heads(3, 1, 1).lengths(90, 130),
        case("scale 0: only the global branch", scaled(causal(32, Mean), 0.0)).lengths(130, 130),
        case("negative scale", scaled(causal(32, Chunk), -0.1)).lengths(130, 130),
        case("bias", biased(causal(32, Mean), Extra::Shared)).lengths(130, 130),
        case("bias per head, full", biased(full(48, Mean), Extra::PerHead)).heads(2, 2, 2).lengths(130, 130).batch(2),
        case("key mask", masked(causal(64, Mean), Extra::SomeKeys)).batch(2).lengths(200, 200),
        case("key mask and bias, full", masked(biased(full(64, Mean), Extra::Shared), Extra::SomeKeys))
            .batch(2)
            .lengths(130, 130),
        case("key mask, norm 1/n", masked(causal(50, Length), Extra::SomeKeys)).batch(2).lengths(130, 130),
        case("key mask, full, norm 1/n", masked(full(50, Length), Extra::SomeKeys)).batch(3).lengths(90, 130),
        case("all keys masked, full", masked(full(32, Mean), Extra::NoKeys)).batch(2),
        case("all keys masked", masked(causal(32, Mean), Extra::NoKeys)).batch(2),
        case("more than 65 535 heads", causal(1, Mean)).many_heads(),
    ]);
    let aligned = in_whole_vectors(vec![
        case("aligned, the paper's chunk", causal(256, Mean)).lengths(600, 600).widths(64, 128),
        case("aligned, full, ragged chunks", full(100, Length)).lengths(230, 230).widths(128, 64).heads(2, 2, 2),
    ]);
    // Sizes of the kernels of compute capability 9.0; the global branch is wider by 3.
    let warpgroups = in_whole_vectors(vec![
        case("64 by 128, chunks of 64", causal(64, Mean)).widths(61, 128).lengths(200, 200).batch(2),
        case("64 by 40, chunks of 128", causal(128, Chunk)).widths(61, 40).lengths(300, 300).heads(2, 2, 2),
        case("128 wide, two blocks of values", causal(64, Length)).widths(125, 136).lengths(150, 150),
        case("40 wide, the paper's chunk, in segments", causal(256, Mean)).widths(37, 64).lengths(1100, 1100),
        case("64 wide, key mask", masked(causal(64, Mean), Extra::SomeKeys)).widths(61, 64).batch(2).lengths(200, 200),
        case("64 wide, key mask, full", masked(full(64, Mean), Extra::SomeKeys))
            .widths(61, 64)
            .batch(2)
            .lengths(90, 150),
        case("64 wide, key mask, norm 1/n", masked(causal(64, Length), Extra::SomeKeys))
            .widths(61, 64)
            .batch(2)
            .lengths(200, 200),
        case("64 wide, full", full(64, Mean)).widths(61, 64).lengths(90, 150),
        case("128 wide, full, norm 1/C", full(128, Chunk)).widths(125, 128).lengths(300, 300),
    ]);
    [cases, aligned, warpgroups].concat()
}
