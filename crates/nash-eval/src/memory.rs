//! Memory of this process, as Linux tells it.

use std::fs;

/// Largest resident size of this process so far (`VmHWM`), in bytes; `None` where `/proc` does not tell.
///
/// Pages of a memory-mapped model count while they are resident.
pub fn peak_bytes() -> Option<u64> {
    field("VmHWM:")
}

/// Resident size of this process now (`VmRSS`), in bytes; `None` where `/proc` does not tell.
pub fn resident_bytes() -> Option<u64> {
    field("VmRSS:")
}

/// Memory that can be used without swapping (`MemAvailable`), in bytes; `None` where `/proc` does not tell.
pub fn available_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

fn field(name: &str) -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The value of a line `name   1234 kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lines() {
        let text = "Name:\tx\nVmHWM:\t   12 kB\nVmRSS:\t 7 kB\nVmBad:\t seven kB\n";
        assert_eq!(kibibytes(text, "VmHWM:"), Some(12 * 1024));
        assert_eq!(kibibytes(text, "VmRSS:"), Some(7 * 1024));
        assert_eq!(kibibytes(text, "VmBad:"), None);
        assert_eq!(kibibytes(text, "VmSwap:"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_is_no_less_than_an_allocation() {
        let block = vec![1u8; 32 << 20];
        assert!(peak_bytes().unwrap() > block.iter().map(|&b| u64::from(b)).sum::<u64>());
        assert!(resident_bytes().unwrap() <= peak_bytes().unwrap());
    }
}
