//! The command as a user meets it: help, mistakes, and whole runs on tiny models.

use assert_cmd::Command;

fn nashswarm(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("nashswarm").unwrap();
    // A user's environment must not change what is tested.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NASHSWARM_")) {
        command.env_remove(name);
    }
    command
        .env(
            "NASHSWARM_HOME",
            std::env::temp_dir().join("nashswarm-tests-have-no-models"),
        )
        .args(args);
    command
}

fn stdout(args: &[&str]) -> String {
    String::from_utf8(nashswarm(args).assert().success().get_output().stdout.clone()).unwrap()
}

/// Exit status and stderr of a failing command; nothing may be on stdout.
fn failure(args: &[&str]) -> String {
    let output = nashswarm(args).assert().failure().get_output().clone();
    assert!(output.stdout.is_empty(), "stdout carries results only");
    format!(
        "status {}\n{}",
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap()
    )
}

#[test]
fn help() {
    insta::assert_snapshot!("help", stdout(&["--help"]));
    for command in [
        "demo",
        "compress",
        "eval",
        "run",
        "chat",
        "inspect",
        "verify",
        "plan",
        "bench",
        "pull",
        "list",
        "completions",
        "man",
    ] {
        insta::assert_snapshot!(format!("help_{command}"), stdout(&[command, "--help"]));
    }
}

#[test]
fn mistakes_in_the_command_line_exit_with_2() {
    for (name, args) in [
        ("no_command", &[][..]),
        ("unknown_option", &["eval", "x", "--chunk", "3"]),
        (
            "two_budgets",
            &["compress", "x", "-o", "y", "--bpw", "3", "--size", "4MB"],
        ),
        (
            "bad_width",
            &["compress", "x", "-o", "y", "--tensor-type", "*.q_proj=7"],
        ),
        ("bad_size", &["compress", "x", "-o", "y", "--size", "4 parsecs"]),
        ("no_output", &["compress", "x"]),
        ("no_shape", &["plan"]),
    ] {
        let told = failure(args);
        assert!(told.starts_with("status 2\n"), "{told}");
        insta::assert_snapshot!(format!("usage_{name}"), told);
    }
}

#[test]
fn completions_and_manual() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(stdout(&["completions", shell]).contains("nashswarm"), "{shell}");
    }
    assert!(stdout(&["man"]).contains(".TH nashswarm 1"));
    let dir = tempfile::tempdir().unwrap();
    stdout(&["man", "-o", dir.path().to_str().unwrap()]);
    assert!(dir.path().join("nashswarm-compress.1").is_file());
}
