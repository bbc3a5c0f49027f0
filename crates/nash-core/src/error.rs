//! What can go wrong with a model file, told so that a person can act on it.
//!
//! An error is a *kind* (with the offending values), the *place* (file, tensor) and a *hint* (what to do).
//! The place is attached while the error travels up: a parser of bytes knows no path, its caller does.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use nash_kernels::LayoutError;

use crate::DType;

/// The result of everything in this crate that can fail.
pub type Result<T, E = CoreError> = std::result::Result<T, E>;

/// An error with its place and a hint.
///
/// `Display` gives `FILE: tensor `NAME`: what happened`, followed by a line `hint: …` where there is one.
pub struct CoreError(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    path: Option<PathBuf>,
    tensor: Option<String>,
    hint: Option<String>,
}

/// What happened, with the values that made it happen. Sizes are in bytes, offsets are from the start of the file
/// (or of the tensor data where the text says so), shapes are outermost dimension first.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was attempted, as a verb phrase: `open`, `write`, `rename`.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The file has no bytes at all.
    #[error("the file is empty")]
    EmptyFile,
    /// A directory where a file is needed.
    #[error("is a directory, a file is needed")]
    IsDirectory,
    /// Neither GGUF nor a model folder nor a safetensors file.
    #[error("not a model: {reason}")]
    NotAModel {
        /// What was looked for and not found.
        reason: String,
    },
    /// The right kind of file in a version that is not supported.
    #[error("{format} version {version} is not supported")]
    UnsupportedVersion {
        /// Name of the format.
        format: &'static str,
        /// Version found.
        version: u64,
    },
    /// The file ends inside something.
    #[error("truncated: {what} at byte {offset} needs {needed} bytes, {available} are left")]
    Truncated {
        /// What was being read.
        what: String,
        /// Where it starts.
        offset: u64,
        /// Bytes it needs.
        needed: u64,
        /// Bytes that are left.
        available: u64,
    },
    /// A count or size that no sane file has.
    #[error("{what} is {value}, the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The value found.
        value: u64,
        /// The largest value accepted.
        limit: u64,
    },
    /// A size that does not fit into 64 bits.
    #[error("the size of {shape:?} as {dtype} overflows")]
    SizeOverflow {
        /// Element type.
        dtype: DType,
        /// The declared shape.
        shape: Vec<usize>,
    },
    /// Text that is not UTF-8.
    #[error("{what} is not valid UTF-8")]
    NotUtf8 {
        /// Which text.
        what: String,
    },
    /// A header or a JSON file that does not parse, or lacks something.
    #[error("invalid {what}: {reason}")]
    Invalid {
        /// Which part of the file.
        what: &'static str,
        /// Why it was refused.
        reason: String,
    },
    /// The same name twice.
    #[error("the name `{name}` occurs twice")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// An element type this crate does not know.
    #[error("unknown element type {dtype}")]
    UnknownDType {
        /// Its name or number in the file.
        dtype: String,
    },
    /// An element type that has no float values.
    #[error("element type {dtype} cannot be read as float")]
    NotFloat {
        /// The type.
        dtype: DType,
    },
    /// A row that is not a whole number of blocks.
    #[error("shape {shape:?}: rows of {dtype} must be multiples of {} elements", .dtype.block_len())]
    PartialBlock {
        /// Element type.
        dtype: DType,
        /// The declared shape.
        shape: Vec<usize>,
    },
    /// Shape and number of bytes contradict each other.
    #[error("shape {shape:?} as {dtype} takes {expected} bytes, there are {found}")]
    SizeMismatch {
        /// Element type.
        dtype: DType,
        /// The declared shape.
        shape: Vec<usize>,
        /// Bytes that the shape needs.
        expected: u64,
        /// Bytes declared or given.
        found: u64,
    },
    /// A shape other than the one expected.
    #[error("shape {found:?}, expected {expected:?}")]
    ShapeMismatch {
        /// Expected shape.
        expected: Vec<usize>,
        /// Shape found.
        found: Vec<usize>,
    },
    /// An element type other than the one expected.
    #[error("element type {found}, expected {expected}")]
    DTypeMismatch {
        /// Expected type.
        expected: DType,
        /// Type found.
        found: DType,
    },
    /// A dimension of zero where elements are needed.
    #[error("shape {shape:?} has a dimension of zero")]
    ZeroDimension {
        /// The declared shape.
        shape: Vec<usize>,
    },
    /// Tensor bytes that lie outside of the file.
    #[error("bytes {start}..{end} of the tensor data, of which there are only {available}")]
    OutOfBounds {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// Bytes of tensor data in the file.
        available: u64,
    },
    /// Two tensors claim the same bytes.
    #[error("its bytes overlap those of `{other}`")]
    Overlap {
        /// The other tensor.
        other: String,
    },
    /// Bytes of tensor data that belong to no tensor.
    #[error("bytes {start}..{end} of the tensor data belong to no tensor")]
    UnusedBytes {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// An offset that is not a multiple of the file's alignment.
    #[error("offset {offset} is not a multiple of the alignment {alignment}")]
    Misaligned {
        /// Offset in the tensor data.
        offset: u64,
        /// Alignment of the file.
        alignment: u64,
    },
    /// No tensor of that name.
    #[error("no such tensor among the {available} of the model")]
    MissingTensor {
        /// How many tensors there are.
        available: usize,
    },
    /// No metadata of that key.
    #[error("metadata key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// Metadata of another type.
    #[error("metadata key `{key}` is {found}, expected {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// Type expected, in words.
        expected: &'static str,
        /// Type found.
        found: String,
    },
    /// A file that belongs to the model is not there.
    #[error("the file `{file}` is missing")]
    MissingFile {
        /// Its name inside the model folder.
        file: String,
    },
    /// A file name that leads out of the model folder.
    #[error("the file name `{file}` leads out of the model folder")]
    UnsafePath {
        /// The name as written in the index.
        file: String,
    },
    /// Rows outside of the tensor.
    #[error("rows {start}..{end} of a tensor with {rows} rows")]
    RowRange {
        /// First row.
        start: usize,
        /// One past the last row.
        end: usize,
        /// Rows of the tensor.
        rows: usize,
    },
    /// A buffer of the wrong length (in elements).
    #[error("a buffer of {found} elements where {expected} are needed")]
    BufferLength {
        /// Elements needed.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// NaN or infinity where only finite numbers make sense.
    #[error("{what} {index} is {value}")]
    NotFinite {
        /// What the number is, e.g. `row scale`.
        what: &'static str,
        /// Its index.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// The parts of a packed matrix contradict its shape.
    #[error("{0}")]
    Layout(LayoutError),
    /// The bytes are not the ones the checksum was made of.
    #[error("sha256 is {found}, expected {expected}")]
    Checksum {
        /// Expected digest, lower-case hexadecimal.
        expected: String,
        /// Digest of the bytes.
        found: String,
    },
}

impl ErrorKind {
    /// What to do about it, where the kind alone says so.
    fn default_hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::EmptyFile | Self::Truncated { .. } | Self::OutOfBounds { .. } => {
                "the download or copy was probably cut short; fetch the file again and compare its sha256"
            }
            Self::NotAModel { .. } | Self::IsDirectory => {
                "give a .gguf file, a Hugging Face folder (config.json and *.safetensors) or a packed model folder"
            }
            Self::UnknownDType { .. } => {
                "a newer version of this program may know it; or convert the model to F16"
            }
            Self::MissingFile { .. } => {
                "fetch the whole model again; every file of it has to lie in one folder"
            }
            Self::UnsafePath { .. } => {
                "do not use this model: a harmless index names files of its own folder only"
            }
            Self::Checksum { .. } => "the file is damaged or was changed; fetch or make it again",
            Self::NotFinite { .. } => "the model is damaged; fetch or make it again",
            _ => return None,
        })
    }
}

impl CoreError {
    /// An error of this kind, with no place yet.
    pub fn new(kind: ErrorKind) -> Self {
        let hint = kind.default_hint().map(str::to_owned);
        Self(Box::new(Inner {
            kind,
            path: None,
            tensor: None,
            hint,
        }))
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::new(ErrorKind::Io { action, source }).with_path(path)
    }

    pub(crate) fn invalid(what: &'static str, reason: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Invalid {
            what,
            reason: reason.to_string(),
        })
    }

    /// Names the file, unless a more precise place was named before.
    #[must_use]
    pub fn with_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.path.get_or_insert_with(|| path.into());
        self
    }

    /// Names the tensor, unless one was named before.
    #[must_use]
    pub fn with_tensor(mut self, name: impl Into<String>) -> Self {
        self.0.tensor.get_or_insert_with(|| name.into());
        self
    }

    /// Says what to do, instead of what the kind suggests.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// What happened.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The file concerned.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The tensor concerned.
    pub fn tensor(&self) -> Option<&str> {
        self.0.tensor.as_deref()
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl From<ErrorKind> for CoreError {
    fn from(kind: ErrorKind) -> Self {
        Self::new(kind)
    }
}

impl fmt::Display for CoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = self.path() {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(tensor) = self.tensor() {
            write!(f, "tensor `{tensor}`: ")?;
        }
        write!(f, "{}", self.0.kind)?;
        match self.hint() {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for CoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreError")
            .field("kind", &self.0.kind)
            .field("path", &self.0.path)
            .field("tensor", &self.0.tensor)
            .field("hint", &self.0.hint)
            .finish()
    }
}

impl std::error::Error for CoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The message holds that of the cause; what follows is the cause of the cause.
        match &self.0.kind {
            ErrorKind::Io { source, .. } => source.source(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_file_tensor_values_and_hint() {
        let error = CoreError::new(ErrorKind::OutOfBounds {
            start: 64,
            end: 128,
            available: 100,
        })
        .with_tensor("blk.0.attn_q.weight")
        .with_path("model.gguf");
        assert_eq!(
            error.to_string(),
            "model.gguf: tensor `blk.0.attn_q.weight`: bytes 64..128 of the tensor data, of which there are only 100\n\
             hint: the download or copy was probably cut short; fetch the file again and compare its sha256"
        );
    }

    #[test]
    fn the_most_precise_place_wins() {
        let error = CoreError::new(ErrorKind::EmptyFile)
            .with_path("part-2")
            .with_path("part-1");
        assert_eq!(error.path(), Some(Path::new("part-2")));
    }

    #[test]
    fn an_error_stays_small() {
        assert_eq!(size_of::<CoreError>(), size_of::<usize>());
    }
}
