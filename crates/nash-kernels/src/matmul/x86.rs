//! What the kernels for x86-64 share.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Job;
use super::common::code_bytes;
use crate::layout::TILE_ROWS;

/// How far ahead of the stream to prefetch, in bytes.
const AHEAD: usize = 2048;

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
