use std::io::{Read, Write};
use std::os::unix::fs::symlink;

use super::*;

#[test]
fn an_ordinary_file_is_opened_for_what_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    std::fs::create_dir(at.join("inner")).unwrap();
    let path = Path::new("inner/file");
    assert_eq!(open(at, path, Access::Read).unwrap_err().kind(), io::ErrorKind::NotFound);
    for piece in ["one ", "two"] {
        open(at, path, Access::Append).unwrap().write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(std::fs::metadata(at.join(path)).unwrap().mode() & 0o777, 0o600);
    let mut file = open(at, path, Access::ReadWrite).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    file.write_all(b"!").unwrap();
    assert_eq!(text, "one two");
    assert!(open(at, path, Access::Read).unwrap().write_all(b"x").is_err());
}

#[test]
fn links_pipes_and_ways_out_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    std::fs::create_dir(at.join("inner")).unwrap();
    std::fs::write(at.join("secret"), "").unwrap();
    symlink(at.join("secret"), at.join("inner/link")).unwrap();
    symlink("inner", at.join("folder")).unwrap();
    std::fs::hard_link(at.join("secret"), at.join("inner/second")).unwrap();
    nix::unistd::mkfifo(&at.join("inner/pipe"), Mode::S_IRWXU).unwrap();
    let refused = |path: &str, access| open(at, Path::new(path), access).unwrap_err();
    for access in [Access::Read, Access::ReadWrite, Access::Append] {
        assert_eq!(refused("inner/link", access).raw_os_error(), Some(libc::ELOOP));
        assert_eq!(refused("folder/second", access).raw_os_error(), Some(libc::ELOOP));
        assert_eq!(refused("inner/second", access).kind(), io::ErrorKind::PermissionDenied);
    }
    // A second name is all that can be asked for.
    open(at, Path::new("inner/second"), Access::ReadLinked).unwrap();
    assert_eq!(refused("inner/link", Access::ReadLinked).raw_os_error(), Some(libc::ELOOP));
    assert_eq!(refused("inner/pipe", Access::ReadLinked).kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(refused("inner/pipe", Access::Read).kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(refused("inner", Access::Read).kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(refused("../secret", Access::Read).raw_os_error(), Some(libc::EXDEV));
    assert_eq!(refused("/etc/passwd", Access::Read).raw_os_error(), Some(libc::EXDEV));
}
