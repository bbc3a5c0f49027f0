//! Element types: plain numbers and the block formats of ggml.
//!
//! A block holds `block_len` consecutive elements of one row in `block_bytes` bytes; plain numbers are blocks of one.
//! Sizes and numbers are those of `ggml.h`/`ggml-common.h` (ggml) and of the safetensors specification.

use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal: $len:literal in $bytes:literal, $ggml:expr, $safetensors:expr;)*) => {
        /// Element type of a tensor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum DType {
            $($(#[$doc])* $variant,)*
        }

        impl DType {
            /// Every type.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Elements in a block; 1 for plain numbers.
            pub const fn block_len(self) -> usize {
                match self { $(Self::$variant => $len,)* }
            }

            /// Bytes of a block.
            pub const fn block_bytes(self) -> usize {
                match self { $(Self::$variant => $bytes,)* }
            }

            /// The name the field uses, as ggml and safetensors write it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The number of the type in a GGUF file.
            pub const fn ggml_id(self) -> Option<u32> {
                match self { $(Self::$variant => $ggml,)* }
            }

            /// The name of the type in a safetensors file.
            pub const fn safetensors_name(self) -> Option<&'static str> {
                match self { $(Self::$variant => $safetensors,)* }
            }
        }
    };
}

dtypes! {
    /// IEEE 754 binary32.
    F32 "F32": 1 in 4, Some(0), Some("F32");
    /// IEEE 754 binary16.
    F16 "F16": 1 in 2, Some(1), Some("F16");
    /// The upper half of a binary32.
    BF16 "BF16": 1 in 2, Some(30), Some("BF16");
    /// IEEE 754 binary64.
    F64 "F64": 1 in 8, Some(28), Some("F64");
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities (OCP E4M3, "FN").
    F8E4M3 "F8_E4M3": 1 in 1, None, Some("F8_E4M3");
    /// 8-bit float, 5 exponent and 2 mantissa bits (OCP E5M2).
    F8E5M2 "F8_E5M2": 1 in 1, None, Some("F8_E5M2");
    /// Signed 8-bit integer.
    I8 "I8": 1 in 1, Some(24), Some("I8");
    /// Signed 16-bit integer.
    I16 "I16": 1 in 2, Some(25), Some("I16");
    /// Signed 32-bit integer.
    I32 "I32": 1 in 4, Some(26), Some("I32");
    /// Signed 64-bit integer.
    I64 "I64": 1 in 8, Some(27), Some("I64");
    /// Unsigned 8-bit integer.
    U8 "U8": 1 in 1, None, Some("U8");
    /// Unsigned 16-bit integer.
    U16 "U16": 1 in 2, None, Some("U16");
    /// Unsigned 32-bit integer.
    U32 "U32": 1 in 4, None, Some("U32");
    /// Unsigned 64-bit integer.
    U64 "U64": 1 in 8, None, Some("U64");
    /// One byte, zero or not.
    Bool "BOOL": 1 in 1, None, Some("BOOL");
    /// 4 bits, scale per 32.
    Q4_0 "Q4_0": 32 in 18, Some(2), None;
    /// 4 bits, scale and minimum per 32.
    Q4_1 "Q4_1": 32 in 20, Some(3), None;
    /// 5 bits, scale per 32.
    Q5_0 "Q5_0": 32 in 22, Some(6), None;
    /// 5 bits, scale and minimum per 32.
    Q5_1 "Q5_1": 32 in 24, Some(7), None;
    /// 8 bits, scale per 32.
    Q8_0 "Q8_0": 32 in 34, Some(8), None;
    /// 8 bits, scale and sum per 32 (ggml's activations).
    Q8_1 "Q8_1": 32 in 36, Some(9), None;
    /// 2 bits, 4-bit scale and minimum per 16, super-blocks of 256.
    Q2K "Q2_K": 256 in 84, Some(10), None;
    /// 3 bits, 6-bit scale per 16, super-blocks of 256.
    Q3K "Q3_K": 256 in 110, Some(11), None;
    /// 4 bits, 6-bit scale and minimum per 32, super-blocks of 256.
    Q4K "Q4_K": 256 in 144, Some(12), None;
    /// 5 bits, 6-bit scale and minimum per 32, super-blocks of 256.
    Q5K "Q5_K": 256 in 176, Some(13), None;
    /// 6 bits, 8-bit scale per 16, super-blocks of 256.
    Q6K "Q6_K": 256 in 210, Some(14), None;
    /// 8 bits, float scale per 256, sums per 16 (ggml's activations).
    Q8K "Q8_K": 256 in 292, Some(15), None;
    /// 1.56 bits: a lattice of 2048 ternary octets, 3-bit scale per 32.
    IQ1S "IQ1_S": 256 in 50, Some(19), None;
    /// 1.75 bits: a lattice of 2048 ternary octets, 3-bit scale per 16.
    IQ1M "IQ1_M": 256 in 56, Some(29), None;
    /// 2.06 bits: a lattice of 256 octets, 4-bit scale per 32.
    IQ2XXS "IQ2_XXS": 256 in 66, Some(16), None;
    /// 2.31 bits: a lattice of 512 octets, 4-bit scale per 16.
    IQ2XS "IQ2_XS": 256 in 74, Some(17), None;
    /// 2.56 bits: a lattice of 1024 octets, 4-bit scale per 16.
    IQ2S "IQ2_S": 256 in 82, Some(22), None;
    /// 3.06 bits: a lattice of 256 quartets, 4-bit scale per 32.
    IQ3XXS "IQ3_XXS": 256 in 98, Some(18), None;
    /// 3.44 bits: a lattice of 512 quartets, 4-bit scale per 32.
    IQ3S "IQ3_S": 256 in 110, Some(21), None;
    /// 4 bits on a non-linear grid, scale per 32.
    IQ4NL "IQ4_NL": 32 in 18, Some(20), None;
    /// 4 bits on a non-linear grid, 6-bit scale per 32, super-blocks of 256.
    IQ4XS "IQ4_XS": 256 in 136, Some(23), None;
    /// Ternary, five digits in a byte, scale per 256.
    TQ1_0 "TQ1_0": 256 in 54, Some(34), None;
    /// Ternary, four digits in a byte, scale per 256.
    TQ2_0 "TQ2_0": 256 in 66, Some(35), None;
    /// OCP microscaling: E2M1 elements, E8M0 scale per 32.
    MXFP4 "MXFP4": 32 in 17, Some(39), None;
    /// NVIDIA's E2M1 elements with an unsigned E4M3 scale per 16, blocks of 64.
    NVFP4 "NVFP4": 64 in 36, Some(40), None;
}

impl DType {
    /// The type with this number in a GGUF file.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.ggml_id() == Some(id))
    }

    /// The type with this name in a safetensors file.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.safetensors_name() == Some(name))
    }

    /// Bytes of `elements` consecutive elements; `None` if they are not whole blocks or the size overflows.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Bits per element, scales included.
    pub fn bits_per_element(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block_len() as f64
    }

    /// Whether the type is one of ggml's block formats (and not a plain number).
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unambiguous() {
        for &dtype in DType::ALL {
            if let Some(id) = dtype.ggml_id() {
                assert_eq!(DType::from_ggml_id(id), Some(dtype));
            }
            if let Some(name) = dtype.safetensors_name() {
                assert_eq!(DType::from_safetensors_name(name), Some(dtype));
            }
            assert!(
                dtype.ggml_id().is_some() || dtype.safetensors_name().is_some(),
                "{dtype} is unreachable"
            );
        }
        assert_eq!(DType::from_ggml_id(4), None, "Q4_2 was removed from ggml");
    }

    #[test]
    fn sizes_need_whole_blocks_and_do_not_overflow() {
        assert_eq!(DType::Q4K.bytes(512), Some(288));
        assert_eq!(DType::Q4K.bytes(511), None);
        assert_eq!(DType::F32.bytes(0), Some(0));
        assert_eq!(DType::F64.bytes(usize::MAX), None);
        assert_eq!(DType::Q8_0.bytes(usize::MAX - 31), None);
        assert!((DType::Q4K.bits_per_element() - 4.5).abs() < 1e-12);
    }
}
