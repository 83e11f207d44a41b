//! The one error type of the crate.

/// Why an operation failed. But for [`Error::Gpu`] it refused its input, and nothing has been computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong rank, shape or layout.
    #[error("{function}: argument `{argument}` has {got}, needs {needs}")]
    Shape {
        /// The public function that was called.
        function: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What was passed.
        got: String,
        /// What would be accepted.
        needs: String,
    },
    /// A tensor has an element type that does not go with the others or is not supported.
    #[error("{function}: argument `{argument}` has dtype {got}, needs {needs}")]
    DType {
        /// The public function that was called.
        function: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The dtype that was passed.
        got: String,
        /// The dtypes that would be accepted.
        needs: String,
    },
    /// A scalar option or a tensor's content is outside its range.
    #[error("{function}: argument `{argument}` is {got}, needs {needs}")]
    Value {
        /// The public function that was called.
        function: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The value that was passed.
        got: String,
        /// The range that would be accepted.
        needs: String,
    },
    /// A tensor lives on a device that the call cannot use.
    #[error("{function}: argument `{argument}` is on {got}, needs {needs}")]
    Device {
        /// The public function that was called.
        function: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The device that was passed.
        got: String,
        /// The devices that would be accepted.
        needs: String,
    },
    /// A tensor is tracked for gradients where none can be given.
    #[error("{function}: argument `{argument}` is tracked for gradients but receives none; pass it detached")]
    NoGradient {
        /// The public function that was called.
        function: &'static str,
        /// The argument at fault.
        argument: &'static str,
    },
    /// A GPU is not there, has no room or fails. Unlike with the others, work may have begun.
    #[error("{function}: {doing}: {why}")]
    Gpu {
        /// The public function that was called.
        function: &'static str,
        /// What was being done: the allocation, or the launch with its kernel, grid and parameters.
        doing: String,
        /// What the driver says.
        why: String,
    },
}

/// The result type of the crate.
pub type Result<T> = std::result::Result<T, Error>;
