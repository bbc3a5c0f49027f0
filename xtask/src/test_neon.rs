//! `test-neon`: the tests of the packed kernels on an emulated AArch64 CPU that has the dot products, and on one that lacks them.
//!
//! Emulation tells whether results are right, to the bit; it says nothing about speed.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";
/// Where Debian puts the C library for the target.
const SYSROOT: &str = "/usr/aarch64-linux-gnu";

/// Runs the tests; fails if one fails. If a tool is missing that is an error, too, or with `skip_if_missing` a note.
pub(crate) fn run(skip_if_missing: bool) -> anyhow::Result<()> {
    let missing = missing();
    if !missing.is_empty() {
        let missing = missing.join("\n  ");
        if skip_if_missing {
            println!("note: skipped, the NEON kernels were not tested; missing:\n  {missing}");
            return Ok(());
        }
        bail!("the NEON kernels cannot be tested here; missing:\n  {missing}");
    }
    // Forcing the instruction set makes a test fail where detection does not find it.
    test("max", Some("neon"), &[])?;
    // A dot product here would be an illegal instruction.
    test("cortex-a53", None, &["matmul"])
}

/// What is needed and not there, each with what to do about it.
fn missing() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !has_target() {
        missing.push("the Rust target: rustup target add aarch64-unknown-linux-gnu");
    }
    if !runs(LINKER) {
        missing.push("aarch64-linux-gnu-gcc: apt-get install gcc-aarch64-linux-gnu");
    }
    if !Path::new(SYSROOT).join("lib/crt1.o").exists() {
        missing.push("a C library for AArch64: apt-get install libc6-dev-arm64-cross");
    }
    if !runs(EMULATOR) {
        missing.push("qemu-aarch64: apt-get install qemu-user");
    }
    missing
}

/// Whether the program is there and works.
fn runs(program: &str) -> bool {
    let quiet = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    quiet.is_ok_and(|status| status.success())
}

/// Whether the compiler has a standard library for the target.
fn has_target() -> bool {
    let libraries = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", TARGET])
        .output();
    libraries.is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
}

/// Runs the tests whose names contain `filter` on a CPU, with this instruction set forced or with the one that is detected.
fn test(cpu: &str, isa: Option<&str>, filter: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("cargo");
    command
        .args([
            "test",
            "--release",
            "--package",
            "nash-kernels",
            "--target",
            TARGET,
        ])
        .arg("--")
        .args(filter)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
            format!("{EMULATOR} -cpu {cpu} -L {SYSROOT}"),
        )
        .env_remove("NASHSWARM_ISA")
        .envs(isa.map(|isa| ("NASHSWARM_ISA", isa)));
    println!("on {cpu}, instruction set {}:", isa.unwrap_or("as detected"));
    let status = command.status().context("cannot run cargo")?;
    ensure!(status.success(), "the tests failed on the emulated {cpu}");
    Ok(())
}
