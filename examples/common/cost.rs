//! Counted work: what the definition costs, not what an implementation happens to do.

use attn_kernels::gau::MixedChunkOptions;
use attn_kernels::problem::Mask;
use attn_kernels::transnormer::DiagOptions;

use super::call::Call;
use super::mechanism::{self, DIRECTIONS, Mechanism, Pass};

/// Multiplications and additions of the matrix products. Exponentials are not counted; the linear family is counted
/// as its recurrence, backward with the sums computed again.
pub fn flops(call: &Call<'_>, pass: Pass) -> f64 {
    let shape = &call.inputs.shape;
    let (width, causal) = (shape.width as f64, call.causal);
    let heads = (shape.batch * shape.heads) as f64;
    heads
        * match call.mechanism {
            Mechanism::Softmax | Mechanism::Gau => quadratic(call, pass, mechanism::visible_keys(causal)),
            Mechanism::Diag => {
                quadratic(call, pass, Mask::Blocks { size: DiagOptions::<()>::default().block_size, causal })
            }
            Mechanism::Linear => linear(call, pass, width, true),
            Mechanism::Norm | Mechanism::Retention => linear(call, pass, width, false),
            Mechanism::Performer => {
                let projections = if pass == Pass::Fwd { 2.0 } else { 4.0 };
                let rows = (shape.queries + shape.keys) as f64;
                linear(call, pass, DIRECTIONS as f64, true) + projections * rows * DIRECTIONS as f64 * width
            }
            Mechanism::Flash => {
                let size = MixedChunkOptions::<()>::default().chunk_size;
                quadratic(call, pass, Mask::Blocks { size, causal }) + linear(call, pass, width, false)
            }
        }
}

/// Two products forward, five backward, over the visible pairs of one head.
fn quadratic(call: &Call<'_>, pass: Pass, mask: Mask) -> f64 {
    let shape = &call.inputs.shape;
    let (width, value_width) = (shape.width as f64, shape.value_width as f64);
    let visible = |i: usize| mask.visible(i as i64 + shape.keys as i64 - shape.queries as i64, shape.keys).len() as f64;
    let pairs: f64 = (0..shape.queries).map(visible).sum();
    match pass {
        Pass::Fwd => 2.0 * pairs * (width + value_width),
        Pass::Bwd => 2.0 * pairs * (3.0 * width + 2.0 * value_width),
    }
}

/// One head: a key enters S and a query reads it; backward S again, its gradient and those of q, k and v.
fn linear(call: &Call<'_>, pass: Pass, features: f64, normalized: bool) -> f64 {
    let shape = &call.inputs.shape;
    let columns = shape.value_width as f64 + if normalized { 1.0 } else { 0.0 };
    let per_token = 2.0 * features * columns;
    match pass {
        Pass::Fwd => per_token * (shape.queries + shape.keys) as f64,
        Pass::Bwd => per_token * (2.0 * shape.queries as f64 + 3.0 * shape.keys as f64),
    }
}

/// Bytes of the operands and results, each moved once.
pub fn bytes(call: &Call<'_>, pass: Pass) -> f64 {
    let inputs = call.inputs;
    let forward = inputs.q.bytes() + inputs.k.bytes() + inputs.v.bytes() + inputs.d_out.bytes();
    let bytes = match pass {
        Pass::Fwd => forward,
        Pass::Bwd => forward + inputs.d_out.bytes() + call.gradient_bytes(),
    };
    bytes as f64
}
