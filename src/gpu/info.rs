use std::fmt;

use super::plan::DeviceFacts;

/// What this build can run on, and what this machine has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Info {
    /// What the kernels were compiled for: `sm_…` for a processor, `compute_…` for any later one.
    pub architectures: Vec<&'static str>,
    /// The CUDA whose compiler made the kernels, major and minor.
    pub toolkit: Option<(u32, u32)>,
    /// Number of kernels in this build.
    pub kernels: usize,
    /// The newest CUDA that the driver supports, major and minor.
    pub driver: Option<(u32, u32)>,
    /// In the driver's order.
    pub devices: Vec<DeviceInfo>,
    /// Why no GPU is used at all.
    pub unused: Option<String>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// As the driver calls it.
    pub name: String,
    /// What plans depend on; zeros where the driver does not say.
    pub facts: DeviceFacts,
    /// Memory in bytes, 0 where the driver does not say.
    pub memory: usize,
    /// Why it cannot be used.
    pub unused: Option<String>,
}

/// Looks for GPUs. Never fails: what is missing is said in [`Info::unused`].
#[cfg(not(feature = "gpu"))]
pub fn info() -> Info {
    let unused = Some("this build is without the feature `gpu`".into());
    Info { unused, ..Info::default() }
}

/// Looks for GPUs, without opening any. Never fails: what is missing is said in [`Info::unused`], what keeps one of
/// several from being used in its [`DeviceInfo::unused`].
#[cfg(feature = "gpu")]
pub fn info() -> Info {
    use super::{driver, module};

    let (architectures, kernels) = module::built();
    let toolkit = module::TOOLKIT;
    let mut info = Info { architectures: architectures.to_vec(), toolkit, kernels, ..Info::default() };
    if kernels == 0 {
        info.unused = Some("this build is without kernels (ATTN_KERNELS_STUB)".into());
    }
    match driver::open() {
        Ok(version) => {
            info.driver = Some(version);
            match driver::devices() {
                Ok(devices) => info.devices = devices,
                Err(why) => info.unused = info.unused.or(Some(why)),
            }
        }
        Err(why) => info.unused = info.unused.or(Some(why)),
    }
    let refusal = info.driver.and_then(|driver| driver::refusal(driver, toolkit));
    for device in info.devices.iter_mut().filter(|device| device.unused.is_none()) {
        let unsupported = || module::unsupported(device.facts.compute_capability, info.driver);
        device.unused = refusal.clone().or_else(unsupported);
    }
    info.unused = info.unused.or(refusal);
    if info.unused.is_none() && info.devices.iter().all(|device| device.unused.is_some()) {
        let first = info.devices.iter().find_map(|device| device.unused.clone());
        info.unused = Some(first.unwrap_or("the driver has no device".into()));
    }
    info
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let for_what = if self.architectures.is_empty() { "" } else { " for " };
        let toolkit = self.toolkit.map_or(String::new(), |(major, minor)| format!(", by CUDA {major}.{minor}"));
        writeln!(f, "{} kernels{for_what}{}{toolkit}", self.kernels, self.architectures.join(", "))?;
        if let Some((major, minor)) = self.driver {
            writeln!(f, "driver for CUDA {major}.{minor}")?;
        }
        for (ordinal, device) in self.devices.iter().enumerate() {
            let DeviceFacts { multiprocessors, shared_bytes_per_block, runs_sm90a, .. } = device.facts;
            let (major, minor) = device.facts.compute_capability;
            let gib = device.memory as f64 / f64::from(1 << 30);
            let shared_kib = shared_bytes_per_block / 1024;
            write!(f, "GPU {ordinal}: {}, compute capability {major}.{minor}, ", device.name)?;
            write!(f, "{multiprocessors} multiprocessors with {shared_kib} KiB, {gib:.1} GiB")?;
            write!(f, "{}", if runs_sm90a { ", with kernels for sm_90a" } else { "" })?;
            let unused = device.unused.as_ref().map_or(String::new(), |why| format!(", not used: {why}"));
            writeln!(f, "{unused}")?;
        }
        self.unused.as_ref().map_or(Ok(()), |why| writeln!(f, "no GPU is used: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_why() {
        let info = info();
        assert_eq!(info.unused.is_none(), info.devices.iter().any(|device| device.unused.is_none()), "{info}");
        if !cfg!(feature = "gpu") {
            assert_eq!(info.to_string(), "0 kernels\nno GPU is used: this build is without the feature `gpu`\n");
        }
    }

    #[test]
    fn prints() {
        let name = "NVIDIA H200".to_string();
        let device = DeviceInfo { name, facts: DeviceFacts::H200, memory: 141 << 30, unused: None };
        let info = Info {
            architectures: vec!["sm_80", "sm_90a"],
            toolkit: Some((13, 0)),
            kernels: 12,
            driver: Some((13, 1)),
            devices: vec![device.clone(), DeviceInfo { unused: Some("too old".into()), ..device }],
            unused: None,
        };
        let gpu = "NVIDIA H200, compute capability 9.0, 132 multiprocessors with 227 KiB, 141.0 GiB, \
                   with kernels for sm_90a";
        let expected = format!(
            "12 kernels for sm_80, sm_90a, by CUDA 13.0\ndriver for CUDA 13.1\nGPU 0: {gpu}\nGPU 1: {gpu}, not used: too old\n"
        );
        assert_eq!(info.to_string(), expected);
    }
}
