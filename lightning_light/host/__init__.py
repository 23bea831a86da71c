"""The host: everything that depends on Lightning's class trees and private names."""
