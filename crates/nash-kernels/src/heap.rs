//! The heap of the process.

#![allow(unsafe_code, reason = "three calls of the C library")]

/// Bytes from which on a block is large.
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;

/// Has large blocks go back to the system as soon as they are freed (GNU C library; elsewhere nothing changes). Left alone, the library keeps blocks of up to
/// 32 MiB once one has been freed, and what lives long between them holds the gaps open: a tenth of the peak of a compression.
pub fn return_freed_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a number of the allocator, under its lock; blocks of either kind can be freed afterwards.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE as libc::c_int);
    }
}

/// `len` zeros. Where there are many of them they lie on huge pages, if the system gives those to programs that ask (Linux): a matrix of 9000² then costs two hundred
/// page faults instead of eighty thousand, and products find its rows with as many fewer look-ups.
pub fn zeros(len: usize) -> Vec<f32> {
    let values = vec![0.0; len];
    prefer_huge_pages(&values);
    values
}

/// Asks for huge pages under `values`; before anything is written to them.
fn prefer_huge_pages(values: &[f32]) {
    #[cfg(target_os = "linux")]
    {
        /// A multiple of every page size in use.
        const PAGE: usize = 64 << 10;
        let bytes = size_of_val(values);
        if bytes < LARGE {
            return;
        }
        let skipped = values.as_ptr().addr().next_multiple_of(PAGE) - values.as_ptr().addr();
        let whole = (bytes - skipped) / PAGE * PAGE;
        // SAFETY: `skipped + whole <= bytes`, since a page is smaller than `LARGE`, so the range lies inside of the allocation; it starts at a page.
        // The advice changes which pages hold the values, never the values. One that is refused costs time and nothing else.
        unsafe {
            let start = values.as_ptr().byte_add(skipped).cast_mut();
            libc::madvise(start.cast(), whole, libc::MADV_HUGEPAGE);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}

/// Gives freed pages of the heap back to the system, where the C library keeps them (glibc); elsewhere it does nothing.
///
/// Reading a tokenizer of a quarter million words leaves 200 MB of small freed blocks behind, twice the size of the packed model that
/// it belongs to.
pub fn release_free_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` takes no pointer and may be called at any time from any thread (glibc manual, MT-Safe); it changes no
    // allocation that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::zeros;

    #[test]
    fn zeros_are_zeros_of_any_number() {
        for len in [0, 1, 1 << 20, (1 << 20) + 17, (4 << 20) - 1] {
            let mut values = zeros(len);
            assert!(values.len() == len && values.iter().all(|v| *v == 0.0));
            values.iter_mut().for_each(|v| *v = 1.0);
            assert_eq!(values.iter().filter(|v| **v == 1.0).count(), len);
        }
    }
}
