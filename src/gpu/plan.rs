//! What runs on the device for one pass of an engine, as a value.

use std::fmt;

use super::params::{Field, Image, Type};
use crate::problem::DType;

/// A tensor whose address a kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Argument {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Which keys are there.
    KeyMask,
    /// Added to logits.
    Bias,
    /// Logarithm of the decay.
    LogDecay,
    /// Random directions ω of FAVOR+.
    Omega,
    /// S of the state handed in.
    StateS,
    /// z of the state handed in.
    StateZ,
    /// Stabiliser of the state handed in.
    StateStabilizer,
    /// The output.
    Out,
    /// Its row statistic.
    Statistic,
    /// S of the state handed out.
    FinalS,
    /// z of the state handed out.
    FinalZ,
    /// Stabiliser of the state handed out.
    FinalStabilizer,
    /// Gradient of the output, handed in.
    DOut,
    /// Gradient of the row statistic, handed in.
    DStatistic,
    /// Gradient of the queries, handed out.
    DQ,
    /// Gradient of the keys, handed out.
    DK,
    /// Gradient of the values, handed out.
    DV,
    /// Gradient of the bias, handed out.
    DBias,
    /// Gradient of the log-decay, handed out.
    DLogDecay,
    /// Memory of the plan's own, by index into [`Plan::workspaces`].
    Workspace(usize),
}

/// What a plan depends on besides the problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceFacts {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block can opt in to, in bytes.
    pub shared_bytes_per_block: u32,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Whether kernels for sm_90a run: compute capability 9.0, and a build that has them.
    pub runs_sm90a: bool,
}

impl DeviceFacts {
    /// NVIDIA A100.
    pub const A100: Self = Self {
        multiprocessors: 108,
        shared_bytes_per_block: 163 * 1024,
        compute_capability: (8, 0),
        runs_sm90a: false,
    };
    /// GeForce RTX 3090; the RTX 40 series has as little shared memory.
    pub const RTX_3090: Self =
        Self { multiprocessors: 82, shared_bytes_per_block: 99 * 1024, compute_capability: (8, 6), runs_sm90a: false };
    /// NVIDIA H200 (and H100 SXM).
    pub const H200: Self =
        Self { multiprocessors: 132, shared_bytes_per_block: 227 * 1024, compute_capability: (9, 0), runs_sm90a: true };
}

/// A tensor of four dimensions as the copy engine of compute capability 9 sees it, and the box that one copy moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    /// Whose first element it starts at, at a multiple of 16 bytes.
    pub argument: Argument,
    /// Of its elements.
    pub dtype: DType,
    /// Sizes, innermost dimension first; 1 to 2³².
    pub sizes: [u64; 4],
    /// Distances in bytes along all but the innermost dimension: multiples of 16, not 0, below 2⁴⁰.
    pub strides: [u64; 3],
    /// Sizes of the box, 1 to 256. Its rows have whole 16 bytes; what lies outside the tensor is 0.
    pub block: [u32; 4],
    /// Whether rows of the box are 128 bytes, whose 16-byte chunks are exchanged in shared memory: chunk c of row r lies
    /// at c ^ (r mod 8).
    pub is_swizzled: bool,
}

impl TensorMap {
    /// Of an operand with strides in elements along batch, head and row, and sizes from columns to batch; in boxes of so
    /// many columns and rows, swizzled if their rows are 128 bytes. None if the copy engine cannot have it.
    pub(super) fn of(
        argument: Argument,
        dtype: DType,
        [batch, head, row]: [i64; 3],
        sizes: [usize; 4],
        [columns, rows]: [usize; 2],
    ) -> Option<Self> {
        let bytes = |elements: i64| u64::try_from(elements).ok()?.checked_mul(dtype.size() as u64);
        let mut strides = [bytes(row)?, bytes(head)?, bytes(batch)?];
        // Along a dimension of 1 nothing is at the stride, but the driver looks at it.
        let whole_row = (sizes[0] * dtype.size()).next_multiple_of(16) as u64;
        strides.iter_mut().zip(&sizes[1..]).filter(|(_, size)| **size == 1).for_each(|(stride, _)| *stride = whole_row);
        let map = Self {
            argument,
            dtype,
            sizes: sizes.map(|size| size as u64),
            strides,
            block: [columns as u32, rows as u32, 1, 1],
            is_swizzled: columns * dtype.size() == 128,
        };
        map.is_possible().then_some(map)
    }

    /// Whether the driver would take it.
    pub fn is_possible(&self) -> bool {
        let row = self.block[0] as usize * self.dtype.size();
        let is_size = |size: &u64| (1..=1 << 32).contains(size);
        let is_stride = |stride: &u64| (1..1 << 40).contains(stride) && stride.is_multiple_of(16);
        self.sizes.iter().all(is_size)
            && self.strides.iter().all(is_stride)
            && self.block.iter().all(|size| (1..=256).contains(size))
            && if self.is_swizzled { row == 128 } else { row.is_multiple_of(16) }
    }
}

impl fmt::Display for TensorMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { argument, dtype, sizes, strides, block, is_swizzled } = self;
        let swizzled = if *is_swizzled { ", swizzled" } else { "" };
        write!(f, "{argument:?} {dtype} {sizes:?} by {strides:?} bytes in boxes of {block:?}{swizzled}")
    }
}

/// One launch of one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Name in an instance list of `kernels/`.
    pub kernel: String,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads in a block, those of the instance list.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The kernel's parameter struct with null pointers.
    pub params: Vec<u8>,
    /// Where in it which addresses go, as byte offsets.
    pub pointers: Vec<(usize, Argument)>,
    /// Where in it which tensor maps go, as byte offsets.
    pub tensor_maps: Vec<(usize, TensorMap)>,
    /// Type of the parameter struct.
    pub params_type: Type,
}

impl Launch {
    /// A launch with parameters declared by `kernel_params!`.
    pub fn new<P: Field>(
        kernel: impl Into<String>,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: &P,
    ) -> Self {
        let Image { bytes, pointers, tensor_maps } = Image::of(params);
        let (kernel, params_type) = (kernel.into(), P::TYPE);
        Self { kernel, grid, threads, shared_bytes, params: bytes, pointers, tensor_maps, params_type }
    }

    /// Why a device would refuse it.
    fn refusal(&self, facts: &DeviceFacts, workspaces: usize) -> Option<String> {
        let [x, y, z] = self.grid;
        let absent = |argument: &Argument| matches!(*argument, Argument::Workspace(i) if i >= workspaces);
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65_535 || z > 65_535 {
            return Some(format!("a grid of {x}×{y}×{z} blocks"));
        }
        if self.threads == 0 || self.threads > 1024 || !self.threads.is_multiple_of(32) {
            return Some(format!("{} threads in a block", self.threads));
        }
        if self.shared_bytes > facts.shared_bytes_per_block {
            return Some(format!("{} bytes of shared memory of {}", self.shared_bytes, facts.shared_bytes_per_block));
        }
        if self.params.len() > 4096 {
            return Some(format!("{} bytes of parameters", self.params.len()));
        }
        let refused = self.tensor_maps.iter().find(|(_, map)| !map.is_possible());
        refused
            .map(|(_, map)| format!("a tensor map {map}"))
            .or_else(|| self.arguments().find(absent).map(|a| format!("{a:?} of {workspaces} workspaces")))
    }

    /// Tensors that it takes, by address or by map.
    fn arguments(&self) -> impl Iterator<Item = Argument> + '_ {
        let mapped = self.tensor_maps.iter().map(|(_, map)| map.argument);
        self.pointers.iter().map(|(_, argument)| *argument).chain(mapped)
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.grid;
        let Self { kernel, threads, shared_bytes, .. } = self;
        write!(f, "{kernel}<<<{x}×{y}×{z}, {threads}, {shared_bytes} bytes>>> {} ", self.params_type.name())?;
        let (pointers, tensor_maps) = (self.pointers.clone(), self.tensor_maps.clone());
        let image = Image { bytes: self.params.clone(), pointers, tensor_maps };
        self.params_type.show(&image, 0, f)
    }
}

/// Launches in order, and the memory that they need besides their arguments.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// One after the other, each sees what those before it wrote.
    pub launches: Vec<Launch>,
    /// Sizes in bytes; not cleared.
    pub workspaces: Vec<usize>,
}

impl Plan {
    /// Sets memory aside.
    pub fn workspace(&mut self, bytes: usize) -> Argument {
        self.workspaces.push(bytes);
        Argument::Workspace(self.workspaces.len() - 1)
    }

    /// Adds a launch; see [`Launch::new`].
    pub fn launch<P: Field>(
        &mut self,
        kernel: impl Into<String>,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: &P,
    ) {
        self.launches.push(Launch::new(kernel, grid, threads, shared_bytes, params));
    }

    /// Whether a device with these facts takes every launch.
    ///
    /// # Errors
    /// The kernel, and what is beyond a limit.
    pub fn check(&self, facts: &DeviceFacts) -> Result<(), String> {
        let refusal = |launch: &Launch| {
            let why = launch.refusal(facts, self.workspaces.len())?;
            Some(format!("{}: {why}", launch.kernel))
        };
        self.launches.iter().find_map(refusal).map_or(Ok(()), Err)
    }

    /// Every argument that some launch takes, workspaces left out, in the order of [`Argument`].
    pub fn arguments(&self) -> Vec<Argument> {
        let mut arguments: Vec<_> = self.launches.iter().flat_map(Launch::arguments).collect();
        arguments.retain(|argument| !matches!(argument, Argument::Workspace(_)));
        arguments.sort();
        arguments.dedup();
        arguments
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, bytes) in self.workspaces.iter().enumerate() {
            writeln!(f, "workspace {i}: {bytes} bytes")?;
        }
        self.launches.iter().try_for_each(|launch| writeln!(f, "{launch}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::params::Pointer;
    use super::*;

    crate::kernel_params! {
        struct SumParams {
            input: Pointer,
            bias: Pointer,
            sums: Pointer,
            strides: [i64; 2],
            scale: f32,
            count: u32,
        }
    }

    fn plan() -> Plan {
        let mut plan = Plan::default();
        let sums = plan.workspace(512).into();
        let params =
            SumParams { input: Argument::Q.into(), bias: None.into(), sums, strides: [64, 1], scale: 0.5, count: 3 };
        plan.launch("sum_f32", [2, 1, 1], 128, 1024, &params);
        plan
    }

    #[test]
    fn prints() {
        let printed = "workspace 0: 512 bytes\nsum_f32<<<2×1×1, 128, 1024 bytes>>> SumParams { input: &Q, bias: null, \
                       sums: &Workspace(0), strides: [64, 1], scale: 0.5, count: 3 }\n";
        assert_eq!(plan().to_string(), printed);
        assert_eq!(plan().arguments(), [Argument::Q]);
    }

    #[test]
    fn limits() {
        let refused = |change: fn(&mut Plan)| {
            let mut plan = plan();
            change(&mut plan);
            plan.check(&DeviceFacts::RTX_3090).unwrap_err()
        };
        assert_eq!(plan().check(&DeviceFacts::RTX_3090), Ok(()));
        assert_eq!(refused(|p| p.launches[0].grid[1] = 65_536), "sum_f32: a grid of 2×65536×1 blocks");
        assert_eq!(refused(|p| p.launches[0].threads = 100), "sum_f32: 100 threads in a block");
        assert_eq!(
            refused(|p| p.launches[0].shared_bytes = 101_377),
            "sum_f32: 101377 bytes of shared memory of 101376"
        );
        assert_eq!(refused(|p| p.workspaces.clear()), "sum_f32: Workspace(0) of 0 workspaces");
    }
}
