//! Conflicts over the banks of shared memory, of every kernel, as the emulator counts them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use attn_kernels::gpu::plan::DeviceFacts;

use crate::common::backends::Pass;
use crate::common::cover;
use crate::common::data::Data;
use crate::common::emulator::{self, Banks};
use crate::common::executor::Executor;
use crate::common::extent;

/// Extra passes of 1000 accesses. What there is comes from ends of rows and from scans, two rows to a lane.
const MOST: u64 = 150;
/// Lanes leave out the places of a diagonal outside of the tile, after which the count puts together what they read at
/// different times.
const OF_DIAGONALS: u64 = 600;

#[test]
fn are_few() {
    if extent::leaves_out("bank conflicts") {
        return;
    }
    if !emulator::is_available() {
        return emulator::skip("bank conflicts");
    }
    let counted = Arc::new(Mutex::new(Vec::new()));
    for facts in [DeviceFacts::H200, DeviceFacts::A100] {
        let backends = cover::engines(&Executor::Counter(Arc::clone(&counted)), facts, &[0]);
        for (case, dtype) in cover::smallest(facts) {
            let data = Data::new(&case, dtype);
            for backend in backends.iter().filter(|backend| backend.takes(&case)) {
                backend.run(&case, &data, dtype, Pass::Both).unwrap_or_else(|error| panic!("{dtype} {case}: {error}"));
            }
        }
    }
    let mut kernels = BTreeMap::new();
    for Banks { kernel, accesses, extra_passes } in counted.lock().unwrap().drain(..) {
        let (all, extra) = kernels.entry(kernel).or_insert((0, 0));
        *all += accesses;
        *extra += extra_passes;
    }
    // A count of nothing would be a quiet one.
    let counts = |kernel: &str| kernels.get(kernel).is_some_and(|&(accesses, _)| accesses > 1000);
    for kernel in ["linear_outputs_f32", "linear_keys_sm90_bf16_128", "quadratic_forward_relu_f16_64"] {
        assert!(counts(kernel), "{kernel} has no accesses");
    }
    let most = |kernel: &str| if kernel.starts_with("quadratic_queries_relu") { OF_DIAGONALS } else { MOST };
    let too_many = |&(kernel, &(accesses, extra)): &(&String, &(u64, u64))| extra * 1000 > accesses * most(kernel);
    let line = |(kernel, (accesses, extra)): (&String, &(u64, u64))| format!("{kernel}: {extra} beyond {accesses}");
    let complaints: Vec<String> = kernels.iter().filter(too_many).map(line).collect();
    assert!(complaints.is_empty(), "too many passes through the banks\n{}", complaints.join("\n"));
}
