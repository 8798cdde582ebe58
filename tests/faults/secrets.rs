//! Secrets: where they lie after what can be done with them, and who could read them there.
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::stage::Stage;
use crate::world;

/// Nothing else in the world has this text.
const SECRET: &str = "mellon-5e0b9f7c";

/// Every file below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => folders.push(entry.path()),
                kind if kind.is_file() => found.push(entry.path()),
                _ => (),
            }
        }
    }
    found
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The names of the files below `folder` that hold the text. Fails for one that others than root could read if every
/// directory on the way were open to them.
fn holders(folder: &Path, text: &str) -> BTreeSet<String> {
    let holds = |path: &PathBuf| std::fs::read(path).is_ok_and(|bytes| holds(&bytes, text));
    let name = |path: PathBuf| {
        let found = path.metadata().unwrap();
        assert_eq!((found.uid(), found.mode() & 0o077), (0, 0), "{} can be read by others", path.display());
        path.file_name().unwrap().to_str().unwrap().to_owned()
    };
    files(folder).into_iter().filter(holds).map(name).collect()
}

/// Command lines and environments of all processes.
fn processes() -> Vec<u8> {
    let entries = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|process| ["cmdline", "environ"].map(|file| process.join(file)))
        .flat_map(|file| std::fs::read(file).unwrap_or_default())
        .collect()
}

#[test]
fn user_data_and_tokens_are_with_root_and_in_no_log() {
    world::inside("secrets::user_data_and_tokens_are_with_root_and_in_no_log", async {
        let mut stage = Stage::new();
        // As packages and operators make it, who want the socket in it to be reached.
        std::fs::create_dir(stage.path("state")).unwrap();
        std::fs::set_permissions(stage.path("state"), PermissionsExt::from_mode(0o755)).unwrap();
        stage.flags(&["--log", "info,host=trace,http=trace,toftd=trace,wire=trace"]);
        stage.start();
        stage.import("counter");
        let given = stage.path("given");
        std::fs::write(&given, format!("#cloud-config\npassword: {SECRET}\n")).unwrap();
        let create = ["--wait", "server", "create", "s", "--image", "counter", "--memory", "64M"];
        stage.ok(&[&create[..], &["--user-data-file", given.to_str().unwrap()]].concat());
        std::fs::remove_file(&given).unwrap();
        stage.console("s", "beat 1");
        stage.ok(&["--wait", "server", "reboot", "s", "--grace-s", "0"]);
        let told: Vec<String> = [
            &["server", "show", "s"][..],
            &["server", "list"],
            &["server", "metrics", "s"],
            &["operation", "list"],
            &["event", "list"],
            &["volume", "list"],
            &["host", "check"],
        ]
        .map(|arguments| stage.ok(&[&["-o", "json"], arguments].concat()))
        .into();
        assert!(told.iter().all(|text| !text.contains(SECRET)), "{told:?}");
        assert!(!holds(&processes(), SECRET), "a process shows it");
        // In the records, and on the disk from which the guest reads it. The logs lie beside them.
        let holders = holders(&stage.path("."), SECRET);
        let records = ["toft.db", "toft.db-wal"].map(str::to_owned);
        assert!(
            holders.contains("seed.img") && records.iter().any(|name| holders.contains(name)),
            "{holders:?}"
        );
        assert!(holders.iter().all(|name| name == "seed.img" || records.contains(name)), "{holders:?}");
        stage.ok(&["--wait", "server", "stop", "s", "--grace-s", "0"]);
        stage.stop();

        let mut create = stage.daemon_command();
        let output =
            create.args(["token", "create", "panel"]).stdout(std::process::Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{}", stage.log());
        let token = String::from_utf8(output.stdout).unwrap();
        let (prefix, digits) = token.trim().split_once('_').unwrap();
        assert_eq!((prefix, digits.len()), ("toft", 64), "{token}");
        assert_eq!(self::holders(&stage.path("."), digits), BTreeSet::new());
    });
}
