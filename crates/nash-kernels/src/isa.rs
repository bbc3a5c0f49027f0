//! Which instruction set the packed kernels use: detected once, or forced by an environment variable.

use std::sync::OnceLock;

use thiserror::Error;

/// Name of the environment variable that forces an instruction set.
const VARIABLE: &str = "NASHSWARM_ISA";

/// An instruction set that [`matmul`](crate::matmul) has kernels for. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on every machine.
    Portable,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX2 and VNNI in 256-bit registers: AVX-VNNI (Intel since Alder Lake, AMD since Zen 5), or AVX-512 VL and VNNI (Intel since
    /// Cascade Lake).
    Vnni,
    /// x86-64 with AVX-512 F, BW, VBMI, VBMI2 and VNNI (Intel since Ice Lake, AMD since Zen 4).
    Avx512,
    /// AArch64 (little-endian) with NEON and its dot products (FEAT_DotProd: since Cortex-A55/A75, Neoverse N1, Apple A13/M1).
    Neon,
}

/// Why the instruction set asked for by `NASHSWARM_ISA` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IsaError {
    /// The name is not one of the known ones.
    #[error("NASHSWARM_ISA={name} is unknown; use portable, avx2, vnni, avx512 or neon")]
    Unknown {
        /// The value found.
        name: String,
    },
    /// This CPU does not have it.
    #[error("NASHSWARM_ISA={isa} cannot be used: this CPU lacks it", isa = isa.name())]
    Unavailable {
        /// The instruction set asked for.
        isa: Isa,
    },
}

impl Isa {
    /// All instruction sets, best last.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Vnni, Isa::Avx512, Isa::Neon];

    /// The name that `NASHSWARM_ISA` knows it by.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Vnni => "vnni",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => std::arch::is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Isa::Vnni => Isa::Avx2.is_available() && (has_avx_vnni() || has_avx512_vnni()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vbmi")
                    && std::arch::is_x86_feature_detected!("avx512vbmi2")
                    && std::arch::is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Vnni | Isa::Avx512 => false,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => false,
        }
    }

    /// The instruction sets of this CPU, best last; never empty.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The best instruction set of this CPU.
    pub fn best() -> Isa {
        Isa::ALL
            .into_iter()
            .rev()
            .find(|isa| isa.is_available())
            .unwrap_or(Isa::Portable)
    }

    /// The instruction set in use: that of `NASHSWARM_ISA` if set and possible, else [`best`](Self::best).
    /// Decided at the first call. A program that wants to refuse a bad variable asks
    /// [`from_env`](Self::from_env) first.
    pub fn active() -> Isa {
        static ACTIVE: OnceLock<Isa> = OnceLock::new();
        *ACTIVE.get_or_init(|| Isa::from_env().ok().flatten().unwrap_or_else(Isa::best))
    }

    /// The instruction set that `NASHSWARM_ISA` asks for; `None` if it is not set or empty.
    ///
    /// # Errors
    /// [`IsaError`] if the name is unknown or this CPU lacks the instruction set.
    pub fn from_env() -> Result<Option<Isa>, IsaError> {
        match std::env::var_os(VARIABLE) {
            None => Ok(None),
            Some(value) => Isa::from_name(&value.to_string_lossy()),
        }
    }

    fn from_name(name: &str) -> Result<Option<Isa>, IsaError> {
        if name.is_empty() {
            return Ok(None);
        }
        let known = Isa::ALL
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(name));
        let isa = known.ok_or_else(|| IsaError::Unknown {
            name: name.to_owned(),
        })?;
        if isa.is_available() {
            Ok(Some(isa))
        } else {
            Err(IsaError::Unavailable { isa })
        }
    }
}

/// VNNI in 256-bit registers with the encoding of AVX.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avxvnni")
}

/// VNNI in 256-bit registers with the encoding of AVX-512.
#[cfg(target_arch = "x86_64")]
fn has_avx512_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avx512vl") && std::arch::is_x86_feature_detected!("avx512vnni")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for isa in Isa::available() {
            assert_eq!(Isa::from_name(isa.name()), Ok(Some(isa)));
        }
        assert_eq!(Isa::from_name(""), Ok(None));
        assert_eq!(
            Isa::from_name("AVX9"),
            Err(IsaError::Unknown { name: "AVX9".into() })
        );
    }

    /// So a run that forces an instruction set by the variable fails where the CPU, or the emulator, lacks it.
    #[test]
    fn what_the_variable_asks_for_is_active() {
        if let Some(isa) = Isa::from_env().unwrap() {
            assert_eq!(Isa::active(), isa);
        }
    }

    #[test]
    fn the_best_is_the_last_available() {
        assert_eq!(Isa::available().last(), Some(&Isa::best()));
        assert!(Isa::active().is_available());
    }
}
