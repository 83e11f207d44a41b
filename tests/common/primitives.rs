//! The suite of instructions: launches of kernels/primitives and what they must write, from a file that the emulator's
//! runner dumps (`tests/emulator/README.md` has the format).

use attn_kernels::gpu::params::Pointer;
use attn_kernels::gpu::plan::{Argument, Plan, TensorMap};
use attn_kernels::problem::DType;

use super::emulator::{self, SEEDS, Sanitizer};
use super::executor::{Executor, Tensor};

attn_kernels::kernel_params! {
    /// Of the kernels in kernels/primitives.
    pub struct PrimitiveParams {
        pub input: Pointer,
        pub output: Pointer,
    }
}

attn_kernels::kernel_params! {
    /// Of those that take a tensor map of the input.
    pub struct MappedPrimitiveParams {
        pub map: TensorMap,
        pub input: Pointer,
        pub output: Pointer,
    }
}

/// One launch.
pub struct Primitive {
    pub kernel: String,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    /// Size of floating-point elements of the output; 0 for others, which must be the same bits.
    float_bytes: u32,
    /// How far a result may be from its expectation, relative to it.
    tolerance: f64,
    input: Vec<u8>,
    wanted: Vec<u8>,
    map: Option<TensorMap>,
}

/// The dumped file that `ATTN_PRIMITIVES` names, or a fresh one; none without either.
pub fn read() -> Option<Vec<Primitive>> {
    let dumped = match std::env::var_os("ATTN_PRIMITIVES") {
        Some(path) => std::fs::read(&path).unwrap_or_else(|error| panic!("ATTN_PRIMITIVES: {error}")),
        None if emulator::is_available() => emulator::get(Sanitizer::None).unwrap().dump_primitives().unwrap(),
        None => return None,
    };
    Some(parse(&dumped))
}

fn parse(mut rest: &[u8]) -> Vec<Primitive> {
    fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> &'a [u8] {
        let (first, others) = rest.split_at_checked(bytes).expect("a file that was dumped whole");
        *rest = others;
        first
    }
    fn number(rest: &mut &[u8]) -> u32 {
        u32::from_le_bytes(take(rest, 4).try_into().expect("four bytes"))
    }
    fn run<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
        let length = number(rest) as usize;
        take(rest, length)
    }
    fn wide(rest: &mut &[u8]) -> u64 {
        u64::from_le_bytes(take(rest, 8).try_into().expect("eight bytes"))
    }
    fn map(rest: &mut &[u8]) -> TensorMap {
        let (sizes, strides) = ([(); 4].map(|()| wide(rest)), [(); 3].map(|()| wide(rest)));
        let block = [(); 4].map(|()| number(rest));
        assert_eq!(number(rest), 2, "bytes of an element");
        let is_swizzled = number(rest) == 128;
        TensorMap { argument: Argument::Q, dtype: DType::F16, sizes, strides, block, is_swizzled }
    }
    let mut primitives = Vec::new();
    while !rest.is_empty() {
        let rest = &mut rest;
        primitives.push(Primitive {
            kernel: String::from_utf8_lossy(run(rest)).into_owned(),
            grid: [(); 3].map(|()| number(rest)),
            threads: number(rest),
            shared_bytes: number(rest),
            float_bytes: number(rest),
            tolerance: f64::from_le_bytes(take(rest, 8).try_into().expect("eight bytes")),
            input: run(rest).to_vec(),
            wanted: run(rest).to_vec(),
            map: (number(rest) == 1).then(|| map(rest)),
        });
    }
    primitives
}

impl Primitive {
    /// What is wrong with the results.
    pub fn complaint(&self, executor: &Executor) -> Option<String> {
        let mut plan = Plan::default();
        let (kernel, input, output) = (self.kernel.as_str(), Argument::Q.into(), Argument::Out.into());
        match self.map {
            Some(map) => {
                let params = MappedPrimitiveParams { map, input, output };
                plan.launch(kernel, self.grid, self.threads, self.shared_bytes, &params);
            }
            None => plan.launch(kernel, self.grid, self.threads, self.shared_bytes, &PrimitiveParams { input, output }),
        }
        let input = Tensor::input(Argument::Q, self.input.clone(), 0);
        let tensors = [input, Tensor::output(Argument::Out, self.wanted.len())];
        match executor.run(&plan, &tensors, &SEEDS) {
            Ok(outputs) => self.judge(&outputs[&Argument::Out]),
            Err(error) => Some(error),
        }
    }

    fn judge(&self, got: &[u8]) -> Option<String> {
        if self.float_bytes == 0 {
            let at = got.iter().zip(&self.wanted).position(|(got, wanted)| got != wanted)?;
            return Some(format!("{}: byte {at} is {}, not {}", self.kernel, got[at], self.wanted[at]));
        }
        let size = self.float_bytes as usize;
        let value = |bytes: &[u8]| match size {
            4 => f32::from_le_bytes(bytes.try_into().expect("four bytes")).into(),
            _ => f64::from_le_bytes(bytes.try_into().expect("eight bytes")),
        };
        let agree = |(got, wanted): (&[u8], &[u8])| {
            let (x, y) = (value(got), value(wanted));
            got == wanted || (x.is_nan() && y.is_nan()) || (x - y).abs() <= self.tolerance * y.abs()
        };
        let mut pairs = got.chunks(size).zip(self.wanted.chunks(size));
        let at = pairs.position(|pair| !agree(pair))?;
        let [x, y] = [got, &self.wanted].map(|bytes| value(&bytes[at * size..][..size]));
        Some(format!("{}: element {at} is {x:e}, not {y:e}", self.kernel))
    }
}
