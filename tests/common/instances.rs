//! The instance lists of `kernels/`, read as the build reads them.

#[path = "../../build/instances.rs"]
mod parser;

pub use parser::Instance;

use super::sources::sources;

/// Every kernel of the engines: all but the suite of instructions, whose parameters are the tests' own.
pub fn all() -> Vec<Instance> {
    let is_kernel = |name: &str| name.starts_with("kernels/") && !name.starts_with("kernels/primitives/");
    let files = sources(&["cu"]).into_iter().filter(|(name, _)| is_kernel(name));
    files.flat_map(|(name, text)| parser::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"))).collect()
}
