//! Numbers as people read and type them.

use std::time::Duration;

/// Bytes in decimal units, as model files are sold: `49.2 MB`.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.95 {
            return if unit == "B" {
                format!("{count} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// A duration: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`, `34 days`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let whole = seconds.round() as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        3600..172_800 => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} days", whole / 86_400),
    }
}

/// A time as people type it: `90s`, `5m`, `1.5h`; seconds without a unit.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "" | "s" | "sec" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("`{unit}` is not a unit of time; use s, m or h")),
    };
    match number.trim().parse::<f64>() {
        Ok(n) if n > 0.0 && n * factor < 1e9 => Ok(Duration::from_secs_f64(n * factor)),
        _ => Err("give a time such as 90s, 5m or 2h".into()),
    }
}

/// A count with thousands apart: `134 515 008`.
pub(crate) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// A value with its standard error: `25.79 ± 0.41`, `4.7e7 ± 6.9e6`.
pub(crate) fn plus_minus(value: f64, stderr: f64, digits: usize) -> String {
    if value >= 1e5 {
        return format!("{value:.1e} ± {stderr:.1e}");
    }
    format!("{value:.digits$} ± {stderr:.digits$}")
}

/// Reads a size: `48MB`, `1.5 GB`, `512MiB`, `1000000`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("unknown unit `{other}`; use kB, MB, GB, KiB, MiB or GiB")),
    };
    let value: f64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a size; try 48MB or 1.5GB"))?;
    let bytes = value * factor;
    if !(1.0..9e18).contains(&bytes) {
        return Err(format!("`{text}` is not a size that a file can have"));
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_decimal() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(49_152_000), "49.2 MB");
        assert_eq!(bytes(999_960_000), "1.0 GB");
        assert_eq!(bytes(350_000_000_000), "350.0 GB");
        assert_eq!(bytes(5_000_000_000_000), "5.0 TB");
    }

    #[test]
    fn durations() {
        let of = |seconds| duration(Duration::from_secs_f64(seconds));
        assert_eq!(of(0.84), "0.8 s");
        assert_eq!(of(59.4), "59 s");
        assert_eq!(of(185.0), "3 min 05 s");
        assert_eq!(of(7800.0), "2 h 10 min");
        assert_eq!(of(3e6), "34 days");
    }

    #[test]
    fn times_that_people_type() {
        for (text, seconds) in [
            ("90s", 90.0),
            ("5m", 300.0),
            ("1.5h", 5400.0),
            ("45", 45.0),
            ("2 min", 120.0),
        ] {
            assert_eq!(
                parse_duration(text).map(|d| d.as_secs_f64()),
                Ok(seconds),
                "{text}"
            );
        }
        for bad in ["", "m", "-5m", "5d", "0", "NaN", "1e300h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn counts() {
        assert_eq!(count(0), "0");
        assert_eq!(count(1234), "1 234");
        assert_eq!(count(134_515_008), "134 515 008");
    }

    #[test]
    fn errors() {
        assert_eq!(plus_minus(25.788, 0.41, 2), "25.79 ± 0.41");
        assert_eq!(plus_minus(47_331_594.6, 6_875_942.3, 2), "4.7e7 ± 6.9e6");
    }

    #[test]
    fn sizes_that_people_type() {
        assert_eq!(parse_bytes("48MB"), Ok(48_000_000));
        assert_eq!(parse_bytes("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(parse_bytes("2MiB"), Ok(2 * 1024 * 1024));
        assert_eq!(parse_bytes("77"), Ok(77));
        for bad in ["", "MB", "1.2.3MB", "4XB", "0", "-4MB", "1e9", "nan"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
