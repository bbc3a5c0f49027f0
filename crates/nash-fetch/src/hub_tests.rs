//! The hub client against a small hub on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub serves, and what it was asked.
#[derive(Default)]
struct Shelf {
    /// Contents by name.
    files: BTreeMap<&'static str, Vec<u8>>,
    /// Contents that are listed (size, sha256) instead of those served.
    listed: BTreeMap<&'static str, Vec<u8>>,
    /// Transfers still to be broken off after half of the bytes.
    breaks: Mutex<usize>,
    /// "FILE from START" for each transfer, and the authorization header of each request.
    transfers: Mutex<Vec<String>>,
    tokens: Mutex<Vec<String>>,
}

impl Shelf {
    fn listing(&self) -> String {
        let siblings: Vec<String> = self
            .files
            .iter()
            .map(|(name, data)| {
                let data = self.listed.get(name).unwrap_or(data);
                let lfs = if is_large(name) {
                    format!(r#","lfs":{{"sha256":"{}"}}"#, sha256(data))
                } else {
                    String::new()
                };
                format!(r#"{{"rfilename":"{name}","size":{}{lfs}}}"#, data.len())
            })
            .collect();
        format!(r#"{{"sha":"{COMMIT}","siblings":[{}]}}"#, siblings.join(","))
    }

    fn answer(&self, stream: &mut TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let target = line.split(' ').nth(1)?.to_owned();
        let mut range = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            if header.trim().is_empty() {
                break;
            }
            let (name, value) = header.trim().split_once(": ")?;
            match name.to_ascii_lowercase().as_str() {
                "range" => range = Some(value.to_owned()),
                "authorization" => self.tokens.lock().unwrap().push(value.to_owned()),
                _ => (),
            }
        }
        // Data sets are the same shelf under another address.
        if target.starts_with("/api/models/a/b") || target.starts_with("/api/datasets/a/b") {
            let body = self.listing();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .ok()?;
            return Some(());
        }
        let file = target
            .strip_prefix("/datasets")
            .unwrap_or(&target)
            .strip_prefix("/a/b/resolve/main/")
            .and_then(|name| self.files.get_key_value(name));
        let Some((name, data)) = file else {
            write!(
                stream,
                "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            .ok()?;
            return None;
        };
        let range = range?;
        let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        let start: usize = start.parse().ok()?;
        let end = if end.is_empty() {
            data.len()
        } else {
            data.len().min(end.parse::<usize>().ok()? + 1)
        };
        let etag = if is_large(name) {
            sha256(data)
        } else {
            format!("{:x}", name.len())
        };
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nConnection: close\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\n\
             ETag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\n\r\n",
            end - start,
            end - 1,
            data.len()
        )
        .ok()?;
        let mut body = &data[start..end];
        if range.ends_with('-') {
            self.transfers
                .lock()
                .unwrap()
                .push(format!("{name} from {start}"));
            let mut breaks = self.breaks.lock().unwrap();
            if *breaks > 0 {
                *breaks -= 1;
                body = &body[..body.len() / 2];
            }
        }
        stream.write_all(body).ok()
    }

    /// Serves until the test process ends; returns the endpoint.
    fn serve(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shelf = Arc::clone(self);
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                shelf.answer(&mut stream);
            }
        });
        format!("http://{address}")
    }
}

fn is_large(name: &str) -> bool {
    [".safetensors", ".gguf", ".parquet"]
        .iter()
        .any(|end| name.ends_with(end))
}

fn sha256(data: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(data)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn weights() -> Vec<u8> {
    (0..100_000_u32).flat_map(u32::to_le_bytes).collect()
}

fn model(file: Option<&str>) -> HubRef {
    HubRef {
        repo: "a/b".into(),
        revision: None,
        file: file.map(Into::into),
    }
}

fn folder_model() -> Shelf {
    let files = BTreeMap::from([
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"a\": 1}".to_vec()),
        ("model.safetensors", weights()),
        ("README.md", b"words".to_vec()),
    ]);
    Shelf {
        files,
        ..Shelf::default()
    }
}

fn settings(endpoint: &str, cache: &Path) -> Settings {
    Settings {
        endpoint: Some(endpoint.to_owned()),
        cache: cache.to_owned(),
        token: Some("secret".into()),
        offline: false,
    }
}

#[test]
fn a_folder_is_fetched_once_and_then_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let shelf = Arc::new(folder_model());
    let settings = settings(&shelf.serve(), cache.path());
    let mut seen = (0, 0);
    let path = fetch(&model(None), &settings, &mut |p| seen = (p.bytes, p.total)).unwrap();
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), weights());
    assert!(path.join("config.json").exists() && !path.join("README.md").exists());
    assert_eq!(seen, (400_010, 400_010));
    let transfers = [
        "model.safetensors from 0",
        "tokenizer.json from 0",
        "config.json from 0",
    ];
    assert_eq!(
        *shelf.transfers.lock().unwrap(),
        transfers,
        "the file that makes a folder complete comes last"
    );
    assert!(
        shelf
            .tokens
            .lock()
            .unwrap()
            .iter()
            .all(|token| token == "Bearer secret")
    );

    assert_eq!(fetch(&model(None), &settings, &mut |_| ()).unwrap(), path);
    assert_eq!(
        shelf.transfers.lock().unwrap().len(),
        3,
        "what is here is not fetched again"
    );
    let offline = Settings {
        offline: true,
        endpoint: Some("http://127.0.0.1:1".into()),
        ..settings
    };
    assert_eq!(fetch(&model(None), &offline, &mut |_| ()).unwrap(), path);
    assert!(matches!(
        fetch(&model(Some("x.gguf")), &offline, &mut |_| ()),
        Err(FetchError::Offline { .. })
    ));
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let files = BTreeMap::from([("q/m.gguf", weights())]);
    let shelf = Arc::new(Shelf {
        files,
        breaks: Mutex::new(1),
        ..Shelf::default()
    });
    let path = fetch(&model(None), &settings(&shelf.serve(), cache.path()), &mut |_| ()).unwrap();
    assert!(path.ends_with("q/m.gguf"));
    assert_eq!(fs::read(path).unwrap(), weights());
    assert_eq!(
        *shelf.transfers.lock().unwrap(),
        ["q/m.gguf from 0", "q/m.gguf from 200000"]
    );
}

#[test]
fn other_bytes_than_listed_are_discarded() {
    let cache = tempfile::tempdir().unwrap();
    let mut listed = weights();
    listed[7] ^= 1;
    let shelf = Arc::new(Shelf {
        listed: BTreeMap::from([("model.safetensors", listed)]),
        ..folder_model()
    });
    let settings = settings(&shelf.serve(), cache.path());
    for _ in 0..2 {
        let error = fetch(&model(None), &settings, &mut |_| ()).unwrap_err();
        assert!(
            matches!(error, FetchError::Corrupt { what: "sha256", .. }),
            "{error}"
        );
    }
    assert_eq!(
        shelf.transfers.lock().unwrap().len(),
        2,
        "fetched again, not believed"
    );
    let offline = Settings {
        offline: true,
        ..settings
    };
    assert!(matches!(
        fetch(&model(None), &offline, &mut |_| ()),
        Err(FetchError::Offline { .. })
    ));
}

#[test]
fn a_hub_that_is_not_there_or_does_not_know_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    let error = fetch(
        &model(None),
        &settings("http://127.0.0.1:1", cache.path()),
        &mut |_| (),
    )
    .unwrap_err();
    assert!(matches!(error, FetchError::Hub { .. }), "{error}");
    let shelf = Arc::new(folder_model());
    let other = HubRef {
        repo: "x/y".into(),
        revision: None,
        file: None,
    };
    let error = fetch(&other, &settings(&shelf.serve(), cache.path()), &mut |_| ()).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("x/y: the hub did not give its list of files: http status: 404"),
        "{error}"
    );
}

/// A data set of two parquet files and a text.
fn questions() -> Shelf {
    let files = BTreeMap::from([
        ("README.md", b"words".to_vec()),
        ("cola/train.parquet", weights()),
        ("cola/validation.parquet", b"rows".to_vec()),
        ("data/test.jsonl", b"{}".to_vec()),
    ]);
    Shelf {
        files,
        ..Shelf::default()
    }
}

#[test]
fn only_the_files_asked_for_are_fetched_and_only_once() {
    let cache = tempfile::tempdir().unwrap();
    let shelf = Arc::new(questions());
    let settings = settings(&shelf.serve(), cache.path());
    let mut seen = (0, 0);
    let files = ["cola/validation.parquet", "data/test.jsonl"];
    let folder = fetch_dataset(&model(None), &files, &settings, &mut |p| {
        seen = (p.bytes, p.total);
    })
    .unwrap();
    let expected = format!("datasets--a--b/snapshots/{COMMIT}");
    assert_eq!(folder, cache.path().join(expected));
    assert_eq!(fs::read(folder.join(files[0])).unwrap(), b"rows");
    assert_eq!(fs::read(folder.join(files[1])).unwrap(), b"{}");
    assert_eq!(seen, (6, 6));
    let transfers = ["cola/validation.parquet from 0", "data/test.jsonl from 0"];
    assert_eq!(*shelf.transfers.lock().unwrap(), transfers);

    // What is here needs neither a request nor the network.
    let requests = shelf.tokens.lock().unwrap().len();
    let again = fetch_dataset(&model(None), &files[..1], &settings, &mut |_| ()).unwrap();
    assert_eq!(
        (again, shelf.tokens.lock().unwrap().len()),
        (folder.clone(), requests)
    );
    let offline = Settings {
        offline: true,
        endpoint: Some("http://127.0.0.1:1".into()),
        ..settings
    };
    assert_eq!(
        fetch_dataset(&model(None), &files, &offline, &mut |_| ()).unwrap(),
        folder
    );
    let more = ["cola/validation.parquet", "cola/train.parquet"];
    let error = fetch_dataset(&model(None), &more, &offline, &mut |_| ()).unwrap_err();
    assert!(matches!(error, FetchError::Offline { .. }), "{error}");

    // One more file: only that is transferred, here in two parts.
    *shelf.breaks.lock().unwrap() = 1;
    let online = Settings {
        offline: false,
        endpoint: Some(shelf.serve()),
        ..offline
    };
    assert_eq!(
        fetch_dataset(&model(None), &more, &online, &mut |_| ()).unwrap(),
        folder
    );
    assert_eq!(fs::read(folder.join(more[1])).unwrap(), weights());
    assert_eq!(
        shelf.transfers.lock().unwrap()[2..],
        ["cola/train.parquet from 0", "cola/train.parquet from 200000"]
    );
}

#[test]
fn a_data_set_must_have_the_files_and_hold_what_it_lists() {
    let cache = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf {
        listed: BTreeMap::from([("cola/validation.parquet", b"dots".to_vec())]),
        ..questions()
    });
    let settings = settings(&shelf.serve(), cache.path());
    let error = |file: &str| {
        fetch_dataset(&model(None), &[file], &settings, &mut |_| ())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        error("cola/test.parquet"),
        "the data set a/b has no file cola/test.parquet"
    );
    assert_eq!(error("../a"), "the data set a/b has no file ../a");
    assert!(error("cola/validation.parquet").contains("sha256"));
    // A model of the same name is something else.
    assert!(fetch(&model(None), &settings, &mut |_| ()).is_err());
    assert!(!cache.path().join("models--a--b").exists());
}
