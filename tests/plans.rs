//! The plans of every case on every known device: kernels that exist, and sizes that the device takes.

use std::collections::BTreeSet;

use attn_kernels::gpu::plan::DeviceFacts;

use crate::common::data::Data;
use crate::common::{cases, cover, instances};

const DEVICES: [DeviceFacts; 3] = [DeviceFacts::RTX_3090, DeviceFacts::A100, DeviceFacts::H200];

/// Plans name all kernels and no others, with the threads of the instance list, and every device takes its plans.
#[test]
fn plans_name_every_kernel() {
    let instances = instances::all();
    let mut named = BTreeSet::new();
    for case in cases::all() {
        for &dtype in case.dtypes {
            let data = Data::new(&case, dtype);
            for facts in DEVICES {
                for plan in cover::plans(&case, &data, dtype, facts) {
                    assert_eq!(plan.check(&facts), Ok(()), "{dtype} {case} on {facts:?}");
                    for launch in plan.launches {
                        let instance = instances.iter().find(|instance| instance.kernel == launch.kernel);
                        let instance = instance.unwrap_or_else(|| panic!("no kernel is called {}", launch.kernel));
                        let written = instance.threads.parse::<u32>();
                        assert!(written.is_err() || written == Ok(launch.threads), "threads of {}", launch.kernel);
                        assert_eq!(instance.params, launch.params_type.name(), "parameters of {}", launch.kernel);
                        named.insert(launch.kernel);
                    }
                }
            }
        }
    }
    let idle = instances.iter().filter(|instance| !named.contains(&instance.kernel));
    let idle: Vec<_> = idle.map(|instance| &instance.kernel).collect();
    assert!(idle.is_empty(), "no plan names {idle:?}");
}

/// The cases that sanitizers run are few, and name every kernel.
#[test]
fn few_cases_name_every_kernel() {
    let chosen = cover::smallest(DeviceFacts::H200);
    let named =
        chosen.iter().map(|(case, dtype)| cover::plans(case, &Data::new(case, *dtype), *dtype, DeviceFacts::H200));
    let named: BTreeSet<String> = named.flat_map(|plans| cover::kernels(&plans)).collect();
    assert_eq!(named.len(), instances::all().len());
    assert!(chosen.len() < named.len(), "{} cases for {} kernels", chosen.len(), named.len());
}
