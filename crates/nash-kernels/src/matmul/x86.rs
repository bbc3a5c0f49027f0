//! What the kernels for x86-64 share.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Job;
use crate::layout::TILE_ROWS;

/// How far ahead of the stream to prefetch, in bytes.
const AHEAD: usize = 2048;

/// Calls `$function::<bits>` or `$function::<bits, flag>` for the width of the job.
macro_rules! for_width {
    ($function:ident $(<$flag:literal>)?, $job:expr $(, $argument:expr)*) => {
        match $job.w.shape().width.bits() {
            2 => $function::<2 $(, $flag)?>($job $(, $argument)*),
            3 => $function::<3 $(, $flag)?>($job $(, $argument)*),
            4 => $function::<4 $(, $flag)?>($job $(, $argument)*),
            5 => $function::<5 $(, $flag)?>($job $(, $argument)*),
            6 => $function::<6 $(, $flag)?>($job $(, $argument)*),
            _ => $function::<8 $(, $flag)?>($job $(, $argument)*),
        }
    };
}
pub(super) use for_width;

/// Bytes of codes in a record of a width.
pub(super) const fn code_bytes(bits: usize) -> usize {
    32 * bits
}

/// Bytes of a record of a width.
pub(super) const fn record_bytes(bits: usize) -> usize {
    code_bytes(bits) + TILE_ROWS
}

/// The four scale codes of a record as floats.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn scales<const BITS: usize>(record: &[u8]) -> __m128 {
    let codes = record[code_bytes(BITS)..]
        .first_chunk()
        .map_or(0, |codes| i32::from_le_bytes(*codes));
    _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(codes)))
}

/// Asks for what lies [`AHEAD`] bytes after the record. A hint, which never faults, also beyond the end of the
/// stream.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn prefetch(record: &[u8]) {
    for offset in (0..record.len()).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(record.as_ptr().wrapping_add(AHEAD + offset).cast());
    }
}

/// Asks for the row scales of some tiles. They lie apart from the stream, a few lines of the cache for a task: each would stall the
/// end of a tile, which took a tenth of the time of small matrices.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn prefetch_row_scales(job: &Job<'_>, tiles: &Range<usize>) {
    let rows = job.w.row_scales();
    let rows = rows.get(tiles.start * TILE_ROWS..).unwrap_or_default();
    for line in rows[..rows.len().min(tiles.len() * TILE_ROWS)].chunks(32) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}
